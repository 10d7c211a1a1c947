"""The report as Markdown, for someone who has not read the paper: what each number is, and which direction is good."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from . import sections
from .words import escaped, first_of, ranged, shown, sides_of, table

WORDS = {
    "target shift": "how far the dialled value's own replies became likelier against the replies of other values, "
    "in nats per "
    "token (its *margin*), the mean over all dialled values. **Higher is better**: it is what the dial is for.",
    "CSR": "control success rate: of all choices between the value's reply and another value's reply to the same "
    "question, the "
    "share in which the model finds the value's likelier. At a positive strength **higher is better**, at a "
    "negative one "
    "lower; 50% is no lean. The *CSR change* is what the dial did to it, in percentage points, **higher is better** "
    "(a fall that was wanted counts as positive).",
    "NLR": "normalized leakage rate: how far the values that were *not* dialled rose, on average, per unit of the "
    "target's own "
    "rise. **Lower is better**: 0 is no leakage, 1 means that all rose together.",
    "NGLR": "the same with every group of the value circle counting alike: the target's own group, the groups next "
    "to it, and "
    "the one across. **Lower is better**; leakage to the value's own group is the least strange.",
    "own / other": "how far choices between two values move where the dialled value takes part, over how far they "
    "move where it "
    "does not. **Higher is better**: 1 is an edit that moves everything alike.",
    "KL": "KL divergence from the base model on neutral text, in nats per token: how much changes where no value "
    "is at stake. "
    "**Lower is better**; methods are scaled to the same, so that the other columns compare.",
    "perplexity": "perplexity on neutral text as a multiple of the base model's. **Lower is better**, 1 is no loss.",
    "capability": "change of benchmark accuracy in percentage points, with its standard error. **Higher is "
    "better**, 0 is no loss.",
}


def markdown(report: Mapping[str, Any], pictures: Mapping[str, str] | None = None) -> str:
    """The whole report.

    Args:
        report (`Mapping[str, Any]`): From [`evaluate`].
        pictures (`Mapping[str, str]`, *optional*): File name beside the report -> alt text.

    Returns:
        `str`: Markdown.
    """
    parts: list[list[str]] = [_head(report), _numbers(report), _methods(report)]
    listed: list[Callable[[Mapping[str, Any]], list[str]]] = [
        sections.compared, sections.by_value, sections.groups, sections.choices, sections.pairs, sections.opposing,
        sections.capability, sections.wikitext, sections.answers, sections.judged,
    ]  # fmt: skip
    parts += [part for part in (section(report) for section in listed) if part]
    if pictures:
        parts.append(["## Pictures", *(f"\n![{escaped(alt, 2000)}]({name})" for name, alt in pictures.items())])
    parts.append(_origin(report))
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _head(report: Mapping[str, Any]) -> list[str]:
    scenarios, found = report["scenarios"], report.get("map") or {}
    name = found.get("name") or ", ".join(report["methods"])
    base = report["model"]["name"] or found.get("base_model") or "a model without a name"
    count, values = scenarios["count"], len(report["values"])
    return [
        f"# Evaluation of {escaped(name)}",
        "",
        f"Each of {values} values was dialled, one at a time, at {' and '.join(sides_of(report))}, on "
        f"{escaped(base)}. What the "
        f"model finds likelier was measured on {count} questions that nothing was fitted on, each with a reply for "
        "every value, "
        "matched in length and style; what it costs was measured on neutral text. In brackets: 95% intervals, from "
        "bootstrap "
        f"samples of the questions ({report['bootstrap']['samples']}, seed {report['bootstrap']['seed']}). Negative "
        "strengths are turned round: a fall that was wanted counts as a rise.",
    ]


def _numbers(report: Mapping[str, Any]) -> list[str]:
    left_out = set() if "capability" in report else {"capability"}
    listed = [f"- **{word}**: {text}" for word, text in WORDS.items() if word not in left_out]
    bias = (
        "Leakage adds up rises alone, so noise reads as leakage, and there is more noise in a bootstrap sample of the "
        "questions than in the questions: the intervals of NLR, NGLR and own / other lie on the unfavourable side."
    )
    return ["## What the numbers mean", "", *listed, "", bias]


def _methods(report: Mapping[str, Any]) -> list[str]:
    heads = [
        "method",
        "strength",
        "target shift",
        "CSR",
        "CSR change",
        "NLR",
        "NGLR",
        "own / other",
        "KL",
        "perplexity",
    ]
    with_capability = "capability" in report
    rows = []
    for side in sides_of(report):
        for name, method in report["methods"].items():
            found = method["strengths"][side]
            cost, csr = found["damage"], found["csr"][0]
            row = [
                escaped(name),
                side,
                ranged(found["target"], "+.3f"),
                f"{shown(found['csr_before'][0], '.0%')} → {shown(csr, '.0%')}",
                ranged([None if end is None else 100 * end for end in found["csr_change"]], "+.1f"),
                ranged(found["nlr"]),
                ranged((found["nglr"] or {}).get("all")),
                ranged(found["own_over_other"], ".2f"),
                ranged(cost["kl"]),
                ranged(cost["perplexity_ratio"]),
            ]
            if with_capability:
                row.append(_points(report, name) if side == sides_of(report)[0] else "")
            rows.append(row)
    notes = [
        f"{escaped(name)} could not be scaled to the same KL divergence, so its row does not compare at equal damage."
        for name, method in report["methods"].items()
        if not method["scalable"] or method["notes"].get("not_reached")
    ]
    lines = table([*heads, *(["capability"] if with_capability else [])], rows, 2)
    return ["## All methods", "", *lines, *[f"\n{note}" for note in notes]]


def _points(report: Mapping[str, Any], name: str) -> str:
    tasks = report["capability"]["methods"][name]
    return shown(sum(found["points"] for found in tasks.values()) / len(tasks), "+.1f")


def _origin(report: Mapping[str, Any]) -> list[str]:
    scenarios, found = report["scenarios"], report.get("map") or {}
    cost = next(iter(first_of(report)[1].values()))["damage"]
    listed = {
        "schema": report["schema"],
        "base model": f"{report['model']['name']} ({report['model']['dtype']}, fingerprint "
        f"{report['model']['fingerprint']})",
        "map": f"{found['name']} (fingerprint {found['fingerprint']})" if found else None,
        "scenarios": f"{scenarios.get('set', 'given')} {scenarios.get('split', '')}, {scenarios['count']} "
        f"(sha256 {scenarios['sha256'][:12]})",
        "fitted on": ", ".join(f"{count} {split}" for split, count in (report.get("fitted_on") or {}).items()) or None,
        "neutral text": f"{cost['texts']} texts, {cost['tokens']} tokens",
        "versions": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    }
    return ["## Where this comes from", "", *(f"- {key}: {escaped(item)}" for key, item in listed.items() if item)]
