"""How many neurons it takes, and which score finds them: target shift and leakage at equal KL divergence, on dev.

    python benchmarks/selection.py [--base MODEL] [--sizes 50 200 500 1000 5000] [--scores attribution ...]

The same passes over the training scenarios and over neutral text serve all settings. `balanced` is the leakage-aware
choice (`leakage_penalty` 1) with shifts and gains, at every size; `shifts` is that without gains, and each score ranks
neurons singly, both at `--neurons`. Every map is calibrated on the same few neutral texts and measured at +1 on the same
dev scenarios, for all values. `--checkpoint` takes up the passes of a killed run (or of `neva identify --checkpoint`).
Written to `benchmarks/results/selection_MODEL.json` and `.md`, and drawn in `docs/images/`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from neva_hf import NeVAConfig, NeVAModel, load_base, load_scenarios
from neva_hf.architectures import describe_base
from neva_hf.identify import (
    SCORES,
    balanced_neurons,
    build_map,
    calibrate,
    candidates,
    collect,
    fisher_samples,
    middle_layers,
    reply_samples,
    top_neurons,
    with_logits_per_unit,
)
from neva_hf.identify.dose import leakage
from neva_hf.measure import margins, scenario_log_probs
from neva_hf.scenarios import load_neutral_texts, scenario_values

ROOT = Path(__file__).parent


def progress(items: Iterable[Any], what: str) -> Iterable[Any]:
    """Says now and then how far it is, and how long the rest will take."""
    items, started = list(items), time.time()
    for number, item in enumerate(items):
        if number and number % 16 == 0:
            rest = (time.time() - started) / number * (len(items) - number)
            print(f"  {what}: {number} of {len(items)}, {rest:.0f} s to go", flush=True)
        yield item


def measured(
    base: Any, tokenizer: Any, neuron_map: Any, scenarios: Sequence[Any], texts: Sequence[str]
) -> dict[str, Any]:
    """Calibrates a map and measures every value at +1."""
    model = NeVAModel.from_map(base, neuron_map)
    try:
        calibrate(model, tokenizer, texts)
        before = scenario_log_probs(model, tokenizer, scenarios)
        targets, leaks = {}, {}
        for value in progress(neuron_map.values, "values"):
            with model.strengths({value: 1.0}):
                after = scenario_log_probs(model, tokenizer, scenarios)
            shifts = {}
            for seen in scenario_values(scenarios):
                left_out = () if seen == value else (value,)
                rises = zip(margins(after, seen, left_out), margins(before, seen, left_out), strict=True)
                shifts[seen] = sum(one - other for one, other in rises) / len(before)
            targets[value] = shifts[value]
            leaks[value] = (leakage(shifts, value) or 0.0) * shifts[value]
    finally:
        model.unload()
    total = sum(targets.values())
    return {
        "target": total / len(targets),
        "right_direction": sum(shift > 0 for shift in targets.values()),
        "nlr": sum(leaks.values()) / total,
        "targets": targets,
    }


def draw(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Target shift and leakage against the number of neurons, with the scores as single points."""
    import matplotlib.pyplot as plt

    curve = sorted((row for row in rows if row["method"] == "balanced"), key=lambda row: row["neurons"])
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axis, key, label in (
        (axes[0], "target", "target margin shift (nats per token)"),
        (axes[1], "nlr", "leakage (NLR)"),
    ):
        axis.plot(
            [row["neurons"] for row in curve], [row[key] for row in curve], "o-", color="#0072B2", label="balanced"
        )
        for row, marker in zip((row for row in rows if row["method"] != "balanced"), "sD^vP", strict=False):
            axis.plot(row["neurons"], row[key], marker, color="#D55E00", alpha=0.8, label=row["method"])
        axis.set(xscale="log", xlabel="neurons per value", ylabel=label, ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=None)
    parser.add_argument("--sizes", type=int, nargs="*", default=[50, 200, 500, 1000, 5000])
    parser.add_argument("--scores", nargs="*", default=[], choices=sorted(SCORES))
    parser.add_argument("--neurons", type=int, default=500, help="how many for each of the scores")
    parser.add_argument("--scenarios", type=int, default=6, help="how many of the dev split")
    parser.add_argument("--texts", type=int, default=3, help="how many neutral texts to calibrate on")
    parser.add_argument("--checkpoint", type=Path, default=None)
    options = parser.parse_args()

    base, tokenizer = load_base(options.base)
    train, dev = load_scenarios("schwartz", "train"), load_scenarios("schwartz", "dev")
    dev = dev[:: max(len(dev) // options.scenarios, 1)][: options.scenarios]
    texts, values = load_neutral_texts(), scenario_values(train)
    kept = options.checkpoint
    probes = "probe" in options.scores
    statistics = collect(base, tokenizer, train, values, probes=probes, gains=True, checkpoint=kept, progress=progress)
    layers = middle_layers(len(statistics.modules))
    config = {"values": values, "base": describe_base(base)}
    settings: list[tuple[str, int]] = [("balanced", size) for size in options.sizes]
    settings += [("shifts", options.neurons)] if options.sizes else []
    settings += [(score, options.neurons) for score in options.scores]
    fisher = None if kept is None else kept.with_name(f"{kept.name}.fisher")
    drawn = {"gains": True, "progress": progress}
    if options.sizes:
        samples = fisher_samples(base, tokenizer, texts, checkpoint=fisher, **drawn)
        pool = candidates(statistics, samples, len(values), max(options.sizes), 1.0, layers)
        own = reply_samples(base, tokenizer, train, values, pool, **drawn)

    name = Path(options.base or "smollm2-135m-instruct").name
    output = ROOT / "results" / f"selection_{name}.json"
    rows: list[dict[str, Any]] = []
    for method, neurons in settings:
        if method == "balanced":
            chosen, shifts = balanced_neurons(statistics, samples, len(values), neurons, 1.0, layers, own)
        elif method == "shifts":
            constant = replace(statistics, gain_gradient=None)
            chosen, shifts = balanced_neurons(constant, samples[:, :1], len(values), neurons, 1.0, layers)
        else:
            known = with_logits_per_unit(base, statistics) if method == "probe" else statistics
            scored = SCORES[method](known)
            chosen, shifts = top_neurons(scored.score, neurons, layers), scored.shift
        found = build_map(shifts, chosen, statistics.modules, NeVAConfig(**config))
        rows.append(
            {"method": method, "neurons": neurons, **measured(base, tokenizer, found, dev, texts[: options.texts])}
        )
        row = rows[-1]
        print(f"{method} {neurons}: target {row['target']:+.3f}, NLR {row['nlr']:.3f}", flush=True)
        result = {"base": name, "scenarios": [one.id for one in dev], "texts": options.texts, "rows": rows}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")
    title = f"{name}, {len(dev)} dev questions, strength +1 (KL 0.05)"
    lines = [
        f"# Neurons and scores: {title}",
        "",
        "| choice | neurons per value | target margin | right direction | NLR |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {row['method']} | {row['neurons']} | {row['target']:+.3f} | {row['right_direction']} of {len(values)} "
            f"| {row['nlr']:.3f} |"
            for row in rows
        ),
    ]
    output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    draw(rows, title, ROOT.parent / "docs" / "images" / f"selection_{name}.png")


if __name__ == "__main__":
    main()
