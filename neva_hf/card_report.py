"""The parts of a card that say what a map does: from its report, or from what was measured when it was made."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult

from .card_parts import number
from .card_text import escape, table
from .errors import NeVAError
from .evaluation.kept import map_fingerprint
from .evaluation.markdown import WORDS, ranged, shown
from .neuron_map import NeuronMap

DATASET = "neva-scenarios"
"""The type of the data set that results are reported on; entries of other types in a card are their owner's."""

_PICTURE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}\.png")
_FIRST_PICTURES = ("value_circle_plus", "leakage_matrix_plus")
_TERMS = ("target shift", "CSR", "NLR", "NGLR", "own / other", "KL", "perplexity")
# Names in tables -> what they are short for, and the paper on arXiv.
_METHODS = {
    "CAA": ("contrastive activation addition", "2312.06681"),
    "RepE": ("representation engineering", "2310.01405"),
    "ConVA": ("controlled value vector activation", "2507.11316"),
    "CNA": ("contrastive neuron attribution", "2605.12290"),
    "NPTI": ("neuron-based personality trait induction", "2410.12327"),
    "DPN-LE": ("dual personality neuron localization and editing", "2604.27929"),
}
# Or a reader takes an interval that lies beside its number for a mistake.
_BIAS = (
    "Leakage adds up rises alone, so noise reads as leakage, and a sample drawn from the questions is noisier than they "
    "are: the intervals of NLR, NGLR and own / other lie on the unfavourable side, and may leave the number itself out."
)


def check_report(report: Mapping[str, Any], neuron_map: NeuronMap) -> None:
    """Refuses a report that is about other edits than the map's.

    Raises:
        `NeVAError`: If the fingerprints differ.
    """
    told = report.get("map")
    told = told.get("fingerprint") if isinstance(told, Mapping) else None
    if told is not None and told != map_fingerprint(neuron_map):
        raise NeVAError(
            f"report.json is about another map (its fingerprint is {escape(told, 20)}, this map's "
            f"{map_fingerprint(neuron_map)}): evaluate this one with `neva evaluate`, or remove report.json."
        )


def from_report(report: Mapping[str, Any], pictures: Collection[str], prefix: str = "") -> tuple[str, str]:
    """Tables of control, leakage and damage, and the pictures.

    Args:
        report (`Mapping[str, Any]`): From [`~neva_hf.evaluation.report.read_report`]; a stranger's.
        pictures (`Collection[str]`): The names of the files that are there, beside the report.
        prefix (`str`): The report's folder as seen from the card, such as `"report/"`.

    Returns:
        `tuple[str, str]`: A headline, one sentence of plain text; and the part, Markdown.

    Raises:
        `NeVAError`: If the report has not the form that it says.
    """
    try:
        return _headline(report), _tables(report, pictures, prefix)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration, OverflowError) as error:
        raise _unusable(error) from error


def results(report: Mapping[str, Any], dataset: str | None = None) -> list[EvalResult]:
    """The report's main numbers for the card's `model-index`.

    Args:
        report (`Mapping[str, Any]`): The report.
        dataset (`str`, *optional*): The repository of the scenarios.

    Returns:
        `list[huggingface_hub.EvalResult]`: Of the map alone, not of what it was compared with.

    Raises:
        `NeVAError`: If the report has not the form that it says.
    """
    try:
        scenarios = report["scenarios"]
        shared: dict[str, Any] = {
            "task_type": "text-generation",
            "task_name": "Value steering",
            "dataset_type": DATASET,
            "dataset_name": f"{_plain(scenarios.get('set', 'given'))} scenarios"
            + (f" ({dataset})" if dataset else ""),
            "dataset_split": _plain(scenarios.get("split", "test")),
        }
        found = []
        for side, numbers in _ours(report).items():
            side = _plain(side)
            measured = [
                ("target_shift", f"Target margin shift at {side} (nats per token)", numbers["target"]),
                (
                    "csr_change",
                    f"Change of the control success rate at {side} (share of choices)",
                    numbers["csr_change"],
                ),
                ("nlr", f"Normalized leakage rate at {side}", numbers["nlr"]),
                ("nglr", f"Normalized leakage rate by groups at {side}", (numbers["nglr"] or {}).get("all")),
                ("kl", f"KL divergence on neutral text at {side} (nats per token)", numbers["damage"]["kl"]),
                (
                    "perplexity_ratio",
                    f"Perplexity over the base model's at {side}",
                    numbers["damage"]["perplexity_ratio"],
                ),
            ]
            for kind, name, interval in measured:
                if interval is not None and interval[0] is not None and math.isfinite(interval[0]):
                    found.append(
                        EvalResult(
                            **shared,
                            metric_type=kind,
                            metric_name=name,
                            metric_value=round(float(interval[0]), 4),
                            metric_args={
                                "interval_95": [None if end is None else round(float(end), 4) for end in interval[1:]]
                            },
                        )
                    )
        return found
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration, OverflowError) as error:
        raise _unusable(error) from error


def from_map(neuron_map: NeuronMap) -> str:
    """What was measured when the map was made, for a card without a report.

    Args:
        neuron_map ([`NeuronMap`]): The map.

    Returns:
        `str`: Markdown.
    """
    measured = neuron_map.config.measurements
    rows = []
    for value in neuron_map.values:
        ratios = [number(measured, "calibration", value, side, "perplexity_ratio") for side in ("-1", "+1")]
        doses = [_dose(measured, value, side) for side in (-1.0, 1.0)]
        rows.append(
            [
                f"`{value}`",
                *(shown(ratio, ".2f") for ratio in ratios),
                *(shown(shift, "+.3f") for shift, _ in doses),
                *(shown(leak) for _, leak in doses),
            ]
        )
    heads = [
        "value",
        *(f"{what} at {side}" for what in ("perplexity", "target shift", "leakage") for side in ("−1", "+1")),
    ]
    known = [column for column in range(1, len(heads)) if any(row[column] != "n/a" for row in rows)]
    lead = (
        "This map has not been evaluated on unseen scenarios: `neva evaluate` does, and the next card has the results."
    )
    if not known:
        return lead
    picked = [[row[column] for column in (0, *known)] for row in ([*heads], *rows)]
    return (
        f"{lead} When it was made, this was measured, without intervals. Perplexity is on neutral text, times the base "
        "model's. Target shift: nats per token by which the value's replies became likelier against the others'. Leakage: "
        f"the mean rise of the other values over the target's.\n\n{table(picked[0], picked[1:])}"
    )


def _dose(measured: Mapping[str, Any], value: str, strength: float) -> tuple[float | None, float | None]:
    """Target shift and leakage of a value at one strength, from a map's dose curves."""
    dose: Any = measured.get("dose")
    try:
        place = [float(one) for one in dose["strengths"]].index(strength)
        curve = dose["curves"][value]
        told = {"shift": curve["margins"][value][place], "leak": curve["leakage"][place]}
    except (KeyError, TypeError, ValueError, IndexError):
        return None, None
    return number(told, "shift"), number(told, "leak")


def _ours(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """The numbers of the report's first method, the map, by strength."""
    return next(iter(report["methods"].values()))["strengths"]


def _headline(report: Mapping[str, Any]) -> str:
    side, found = next(iter(_ours(report).items()))
    leak = f"; the other values rise by {shown(found['nlr'][0], '.0%')} of that on average" if found["nlr"][0] else ""
    return (
        f"Measured on {int(report['scenarios']['count'])} unseen questions at strength {escape(side, 8)}: a value's own "
        f"replies become likelier by {shown(found['target'][0])} nats per token against the other values'{leak}. The "
        f"KL divergence from the base model on neutral text is {shown(found['damage']['kl'][0])} nats per token."
    )


def _tables(report: Mapping[str, Any], pictures: Collection[str], prefix: str) -> str:
    scenarios, sides = report["scenarios"], list(_ours(report))
    cost = next(iter(_ours(report).values()))["damage"]
    lines = _pictures(report, pictures, prefix)
    first = lines[:2]
    source = f"{escape(scenarios.get('set', 'given'), 60)}, {escape(scenarios.get('split', 'test'), 30)} split"
    parts = [
        f"Each value was dialled alone. What the model finds likelier was measured on {int(scenarios['count'])} questions "
        f"that nothing was fitted on ({source}), "
        f"each with a reply for every value; the cost on {int(cost['texts'])} neutral texts. In brackets: 95% intervals "
        "(bootstrap). At negative strengths tables count a fall that was wanted as a rise; pictures show it as a fall.",
        *first,
        "### Control, leakage and damage",
        _overall(report, sides),
        *_others(report),
        "\n".join(f"- **{term}**: {WORDS[term]}" for term in _TERMS if term in WORDS),
        _BIAS,
        *_wikitext(report, sides[0]),
        "### Value by value",
    ]
    for side, found in _ours(report).items():
        turned = ", where falls count as rises" if side.startswith("-") else ""
        parts += [f"At {escape(side, 8)}{turned}:", _by_value(found)]
    if isinstance(report.get("capability"), Mapping):
        parts += _capability(report)
    if rest := lines[len(first) :]:
        parts += ["### Pictures", *rest]
    return "\n\n".join(parts)


def _overall(report: Mapping[str, Any], sides: Sequence[str]) -> str:
    rows = []
    for side in sides:
        for place, (name, method) in enumerate(report["methods"].items()):
            found = method["strengths"][side]
            rows.append(
                [
                    f"**this map** ({escape(name, 40)})" if place == 0 else escape(name, 40),
                    escape(side, 8),
                    ranged(found["target"], "+.3f"),
                    _rates(found),
                    ranged(found["nlr"]),
                    ranged((found["nglr"] or {}).get("all")),
                    ranged(found["own_over_other"], ".2f"),
                    ranged(found["damage"]["kl"]),
                    ranged(found["damage"]["perplexity_ratio"]),
                ]
            )
    return table(["method", "at", "target shift", "CSR", "NLR", "NGLR", "own / other", "KL", "perplexity"], rows, 2)


def _others(report: Mapping[str, Any]) -> list[str]:
    """What the methods are that the map is compared with."""
    others = list(report["methods"].items())[1:]
    if not others:
        return []
    told = []
    for name, method in others:
        long, paper = _METHODS.get(name, ("", ""))
        more = [
            *([f"[{long}](https://arxiv.org/abs/{paper})"] if long else []),
            *([] if method["scalable"] else ["cannot be scaled to that divergence"]),
        ]
        told.append(escape(name, 40) + (f" ({'; '.join(more)})" if more else ""))
    return [f"Beside it, from the same scenarios and at the same KL divergence: {', '.join(told)}."]


def _wikitext(report: Mapping[str, Any], side: str) -> list[str]:
    """What it costs on text that is not the project's own, if that was measured."""
    methods = (report.get("wikitext") or {}).get("methods")
    if not methods:
        return []
    found = next(iter(methods.values()))
    return [
        f"On {int(found['tokens']):,} tokens of WikiText at {escape(side, 8)}, the mean over the dialled values: "
        f"perplexity {shown(found['ratio'])} times the base model's ({shown(found['base_perplexity'], '.2f')}), KL "
        f"divergence {shown(found['kl'])} nats per token."
    ]


def _by_value(found: Mapping[str, Any]) -> str:
    rows = [
        [
            _named(value),
            ranged(one["target"], "+.3f"),
            _rates(one),
            ranged(one["nlr"]),
            f"{shown(one['largest_leak'], '+.3f')} {_named(one['largest_leak_at'] or '')}".strip(),
            ranged(found["damage"]["values"][value]["kl"]),
            ranged(found["damage"]["values"][value]["perplexity_ratio"]),
        ]
        for value, one in found["values"].items()
    ]
    return table(["value", "target shift", "CSR", "NLR", "largest leak", "KL", "perplexity"], rows)


def _named(value: str) -> str:
    """A value as code, in which nothing is escaped; or as text, if it is no name of a value."""
    return f"`{value}`" if re.fullmatch(r"[a-z][a-z0-9_]{0,63}", value) else escape(value, 64)


def _rates(found: Mapping[str, Any]) -> str:
    # (on one line: a table breaks anywhere else)
    return f"{shown(found['csr_before'][0], '.0%')}&nbsp;→&nbsp;{ranged(found['csr'], '.0%')}"


def _capability(report: Mapping[str, Any]) -> list[str]:
    ours = next(iter(report["capability"]["methods"].values()))
    rows = [
        [
            escape(task, 60),
            f"{one['base']:.1%}",
            f"{one['points']:+.1f} ± {one['error']:.1f}",
            f"{int(one['questions'])}",
        ]
        for task, one in ours.items()
    ]
    return [
        "### Capability",
        "Change of benchmark accuracy in percentage points, the mean over the dialled values, ± its standard error.",
        table(["benchmark", "base model", "change", "questions"], rows),
    ]


def _pictures(report: Mapping[str, Any], pictures: Collection[str], prefix: str) -> list[str]:
    """A line for each of the report's pictures that are there; what says most comes first."""
    told = {
        name: alt
        for name, alt in (report.get("pictures") or {}).items()
        if name in pictures and _PICTURE.fullmatch(name)
    }
    order = sorted(told, key=lambda name: not name.startswith(_FIRST_PICTURES))
    return [f"{_lead(report, name)}![{escape(told[name], 1500)}]({prefix}{name})" for name in order]


def _lead(report: Mapping[str, Any], picture: str) -> str:
    """A sentence on why a picture has other numbers than the tables, where it has."""
    dose = report.get("dose")
    if picture != "dose_curves.png" or not isinstance(dose, Mapping) or dose.get("source") != "the map":
        return ""
    return (
        f"The curves over the strength were measured when the map was made, on {int(dose['scenarios'])} other questions "
        f"and {int(dose['texts'])} other texts, so their numbers differ from those of the tables.\n\n"
    )


def _plain(text: object) -> str:
    return "".join(sign for sign in str(text)[:60] if sign.isprintable())


def _unusable(error: Exception) -> NeVAError:
    return NeVAError(
        f"report.json has not the form of a report ({type(error).__name__}: {str(error)[:100]}): evaluate again with "
        "`neva evaluate`, or remove it."
    )
