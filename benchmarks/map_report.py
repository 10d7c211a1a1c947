"""The report of `map_quality.py`: from kept pieces to one result, and from the result to Markdown."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import quality

from neva_hf.errors import NeVAError
from neva_hf.values import ValueSystem, load_value_system

if TYPE_CHECKING:
    from map_quality import Run

NAMES = {"map": "neuron map", "caa": "CAA"}


def report(run: Run) -> dict[str, Any]:
    """All numbers, from a run whose pieces are finished."""
    kept, options = run.kept, run.options
    system = circle(run)
    neighbours = {} if system is None else {value: list(system.neighbours(value)) for value in run.values}
    forms = [scenario.form for scenario in run.scenarios]
    weights = quality.draws(len(run.scenarios))
    methods: dict[str, dict[str, Any]] = {"map": {}, "caa": {}}
    ratios = {}
    for sign in options.signs:
        side, tables = f"{sign:+d}", {}
        for name, prefix in (("map", "map"), ("caa", run.caa)):
            edited = {value: kept[f"{prefix}/{side}/{value}"] for value in run.values}
            tables[name] = quality.tables(kept["base"], edited, run.observed, sign)
            found = quality.summary(tables[name], weights, forms, neighbours)
            for kind, sequences in (("neutral", run.texts), ("wikitext", run.windows)):
                if sequences:
                    found[kind] = spent(kept[f"{prefix}/{side}/{kind}, {len(sequences)}"], run.values)
            methods[name][side] = found
        ratios[side] = quality.ratios(tables["map"], tables["caa"], weights)
    order = run.values if system is None else [value.name for value in system if value.name in run.values]
    return {
        "map": Path(options.map).resolve().name,
        "base_model": run.map.base_model,
        "values": run.values,
        "circle": order,
        "observed": run.observed,
        "neurons": run.map.config.provenance.get("neurons"),
        "target_kl": run.target_kl,
        "scenarios": {"set": options.scenarios, "split": options.split, "count": len(run.scenarios)},
        "caa": {
            "layer": run.caa_layer(),
            "target_on_dev": {str(layer): kept[f"{run.caa}/choose/{layer}"]["target"] for layer in run.layers},
            "dev_scenarios": options.choose,
            "calibrated_kl": {f"{sign:+d}": kept[f"{run.caa}/scales/{sign:+d}"]["kl"] for sign in options.signs},
        },
        "methods": methods,
        "map_over_caa": ratios,
    }


def circle(run: Run) -> ValueSystem | None:
    """The value system of the map, or the shipped one that knows its values; `None` without a circle."""
    given = run.map.config.value_system
    try:
        system = ValueSystem.from_dict(given) if given else load_value_system()
        known = system.has_circle and all(value in system for value in run.values)
    except NeVAError:
        return None
    return system if known else None


def spent(found: dict[str, Any], values: list[str]) -> dict[str, Any]:
    """KL divergence and perplexity over the base model's, by value and as a mean."""
    ratio = [math.exp(min(loss - found["base_loss"], 700.0)) for loss in found["loss"]]
    return {
        "tokens": found["tokens"],
        "base_perplexity": math.exp(found["base_loss"]),
        "kl": float(np.mean(found["kl"])),
        "perplexity_ratio": float(np.mean(ratio)),
        "values": {
            value: {"kl": kl, "perplexity_ratio": one}
            for value, kl, one in zip(values, found["kl"], ratio, strict=True)
        },
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as tables."""
    methods, sides = result["methods"], list(result["map_over_caa"])
    count, split, values = result["scenarios"]["count"], result["scenarios"]["split"], result["values"]
    with_wikitext = "wikitext" in methods["map"][sides[0]]
    lines = [
        f"# {result['map']} beside CAA",
        "",
        f"{count} scenarios ({split} split), {len(values)} values, both methods at a KL divergence of "
        f"{result['target_kl']:g} nats per token from {result['base_model']} on the same neutral texts. CAA adds its "
        f"vector behind layer {result['caa']['layer']}, the best of {', '.join(result['caa']['target_on_dev'])}.",
        "",
        "In brackets: 95% intervals, bootstrap over scenarios. Target: shift of the dialled value's margin, nats per "
        "token. NLR: mean rise of the other values' margins over the target's (sums over values divided; next to it the "
        "mean of the values' own ratios). Neighbours: how much of the leakage goes to the values next to it on the circle. "
        "Own / other: how far choices between two values move where the dialled one takes part, and where not. "
        "Negative strengths are mirrored. Perplexity: times the base model's.",
        "",
        "| method | strength | target | right direction | NLR | NLR, mean of ratios | neighbours | own / other | KL | "
        f"perplexity |{' WikiText |' if with_wikitext else ''}",
        f"|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|{'---:|' if with_wikitext else ''}",
    ]
    for side in sides:
        for name, found in ((name, methods[name][side]) for name in ("map", "caa")):
            cells = [
                NAMES[name],
                side,
                ranged(found["target"], "+.3f"),
                f"{found['right_direction']} of {len(values)}",
                ranged(found["nlr"]),
                shown(found["nlr_mean_of_ratios"], ".3f"),
                shown(found["neighbours_share"], ".0%"),
                ranged(found["own_over_other"], ".2f"),
                f"{found['neutral']['kl']:.3f}",
                f"{found['neutral']['perplexity_ratio']:.3f}",
            ]
            lines.append(line([*cells, *([f"{found['wikitext']['perplexity_ratio']:.3f}"] if with_wikitext else [])]))
    texts = methods["map"][sides[0]]["neutral"]
    lines += ["", f"KL and perplexity: {texts['tokens']} tokens of held-out neutral text."]
    if with_wikitext:
        text = methods["map"][sides[0]]["wikitext"]
        lines[-1] += (
            f" WikiText: {text['tokens']} tokens, the base model's perplexity is {text['base_perplexity']:.2f}."
        )
    lines += [
        "",
        "The map over CAA, paired:",
        "",
        "| strength | target | NLR | own / other |",
        "|---:|---:|---:|---:|",
    ]
    for side, found in result["map_over_caa"].items():
        lines.append(line([side, *(ranged(found[name], ".2f") for name in ("target", "nlr", "own_over_other"))]))
    forms = list(methods["map"][sides[0]]["forms"])
    lines += ["", "Target by form of the question:", "", line(["method", "strength", *forms]), rule(2, len(forms))]
    for side in sides:
        for name in ("map", "caa"):
            found = methods[name][side]["forms"]
            lines.append(line([NAMES[name], side, *(f"{found[form]:+.3f}" for form in forms)]))
    for side in sides:
        lines += ["", f"Value by value at {side}:", ""]
        lines += per_value(result, side, with_wikitext)
    return "\n".join(lines) + "\n"


def per_value(result: dict[str, Any], side: str, with_wikitext: bool) -> list[str]:
    """A table with a line per value: the map, and CAA's target and leakage beside it."""
    ours, theirs = result["methods"]["map"][side], result["methods"]["caa"][side]
    heads = ["value", "target", "NLR", "largest leak", "at", "perplexity", "CAA: target", "NLR", "largest leak"]
    if with_wikitext:
        heads.insert(6, "WikiText")
    lines = [line(heads), rule(1, len(heads) - 1)]
    for value in result["values"]:
        one, other = ours["values"][value], theirs["values"][value]
        cells = [
            value,
            ranged(one["target"], "+.3f"),
            shown(one["nlr"], ".3f"),
            f"{one['largest_leak']:+.3f}",
            one["largest_leak_at"] if one["largest_leak"] > 0 else "none",
            f"{ours['neutral']['values'][value]['perplexity_ratio']:.3f}",
            f"{other['target'][0]:+.3f}",
            shown(other["nlr"], ".3f"),
            f"{other['largest_leak']:+.3f}",
        ]
        if with_wikitext:
            cells.insert(6, f"{ours['wikitext']['values'][value]['perplexity_ratio']:.3f}")
        lines.append(line(cells))
    return lines


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def rule(words: int, numbers: int) -> str:
    return "|" + "---|" * words + "---:|" * numbers


def shown(number: float | None, form: str) -> str:
    return "" if number is None else f"{number:{form}}"


def ranged(found: list[float], form: str = ".3f") -> str:
    """`0.31 [0.28, 0.35]`"""
    estimate, low, high = (f"{number:{form}}" for number in found)
    return f"{estimate} [{low}, {high}]"
