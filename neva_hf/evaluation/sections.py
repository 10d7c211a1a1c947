"""The sections of a report in Markdown, one function each; one without numbers gives no lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .words import escaped, first_of, ranged, shown, sides_of, table


def compared(report: Mapping[str, Any]) -> list[str]:
    """The first method beside each other one."""
    if not report["first_beside"]:
        return []
    name = first_of(report)[0]
    forms = {"target": "+.3f", "csr_change": "+.1%", "nlr": "+.3f", "own_over_other": "+.2f"}
    rows = [
        [escaped(other), side, *(ranged(found[key]["minus"], form) for key, form in forms.items()),
         ranged(found["target"]["times"], ".2f")]
        for other, sides in report["first_beside"].items()
        for side, found in sides.items()
    ]  # fmt: skip
    return [
        f"## {escaped(name)} beside each other method",
        "",
        "Its number minus theirs, on the same drawn questions. Good: above 0 for target shift, CSR change and own "
        "/ other, below "
        "0 for NLR; an interval that holds 0 tells no difference. *Times*: its target shift over theirs.",
        "",
        *table(["beside", "strength", "target shift", "CSR change", "NLR", "own / other", "times"], rows, 2),
    ]


def by_value(report: Mapping[str, Any]) -> list[str]:
    """The first method, value by value."""
    name, sides = first_of(report)
    lines = [f"## {escaped(name)}, value by value"]
    for side, found in sides.items():
        rows = [
            [
                escaped(value),
                ranged(one["target"], "+.3f"),
                f"{shown(one['csr_before'][0], '.0%')} → {shown(one['csr'][0], '.0%')}",
                ranged(one["nlr"]),
                shown(one["largest_leak"], "+.3f"),
                escaped(one["largest_leak_at"] or "none"),
                ranged(found["damage"]["values"][value]["kl"]),
                ranged(found["damage"]["values"][value]["perplexity_ratio"]),
            ]
            for value, one in found["values"].items()
        ]
        heads = ["value", "target shift", "CSR", "NLR", "largest leak", "at", "KL", "perplexity"]
        lines += ["", f"At {side} ({found['right_direction']} of {len(rows)} moved the way they were dialled):", ""]
        lines += table(heads, rows)
    return lines


def groups(report: Mapping[str, Any]) -> list[str]:
    """Leakage by groups of the circle."""
    _, sides = first_of(report)
    if not any(found["nglr"] for found in sides.values()):
        return []
    kinds = [kind for kind in next(iter(sides.values()))["nglr"] if kind != "all"]
    rows = [
        [escaped(name), side, *(ranged(method["strengths"][side]["nglr"].get(kind)) for kind in kinds),
         ranged(method["strengths"][side]["neighbours_share"], ".0%")]
        for side in sides
        for name, method in report["methods"].items()
    ]  # fmt: skip
    return [
        "## Where it leaks to",
        "",
        "NGLR by how the leaking value stands to the dialled one: in its own higher-order group (*within*), in a "
        "group next to it "
        "(*adjacent*), or across the circle (*opposite*). *Neighbours*: how much of all leakage goes to the two "
        "values next to "
        "it; higher means that what leaks is at least akin.",
        "",
        *table(["method", "strength", *kinds, "neighbours"], rows, 2),
    ]


def choices(report: Mapping[str, Any]) -> list[str]:
    """Who wins between every two values, before and after."""
    name, sides = first_of(report)
    observed = report["observed"]
    if len(observed) < 2:
        return []
    lines = [
        "## Choices between two values",
        "",
        f"{escaped(name)}: in how many of 100 questions the reply of the row's value is likelier than that of the "
        "column's, before → "
        "after the row's value is dialled. All pairs under all dials are in `report.json`.",
    ]
    for side, found in sides.items():
        pairs = [tuple(pair) for pair in found["choices"]["pairs"]]
        rows = []
        for value in report["values"]:
            cells = []
            for seen in observed:
                turned = (seen, value) in pairs
                if value == seen:
                    cells.append("")
                    continue
                place = pairs.index((seen, value) if turned else (value, seen))
                shares = found["choices"]["before"][place], found["choices"]["after"][value][place]
                told = [None if share is None else 100 * (1 - share if turned else share) for share in shares]
                cells.append(" → ".join(shown(share, ".0f") for share in told))
            rows.append([escaped(value), *cells])
        lines += ["", f"At {side}:", "", *table(["dialled", *map(escaped, observed)], rows)]
    return lines


def pairs(report: Mapping[str, Any]) -> list[str]:
    """Two values dialled together."""
    found = report["pairs"]
    if not found:
        return []
    rows = []
    for one in found["pairs"]:
        first, second = one["values"]
        shifts = [f"{shown(one[when][value][0], '+.3f')}" for value in one["values"] for when in ("alone", "together")]
        rows.append(
            [f"{escaped(first)} + {escaped(second)}", one["relation"] or "", *shifts, ranged(one["held"], ".0%")]
        )
    return [
        "## Two dials at once",
        "",
        f"Does the second dial break the first? Target shifts alone and together at {sides_of(report)[0]}, on "
        f"{found['scenarios']} "
        "questions, the other dialled value's replies left out. *Held*: how much of the shifts is left; 100% is "
        "no harm done. "
        f"All pairs together: **{ranged(found['held'], '.0%')}**.",
        "",
        *table(["dialled", "relation", "first alone", "together", "second alone", "together", "held"], rows, 2),
    ]


def opposing(report: Mapping[str, Any]) -> list[str]:
    """Dials under a system prompt that pushes the other way."""
    found = report["opposing"]
    if not found:
        return []
    rows = [
        [escaped(value), *(ranged(one[kind], "+.3f") for kind in ("dial", "prompt", "both"))]
        for value, one in found["values"].items()
    ]
    example = next(iter(found["prompts"].values()))
    rows.append(["**all**", *(ranged(found[kind], "+.3f") for kind in ("dial", "prompt", "both"))])
    return [
        "## A system prompt that pushes the other way",
        "",
        f"Does the dial hold? Target shifts from the base model at {sides_of(report)[0]}, on {found['scenarios']} "
        "questions: by the "
        f'dial alone, by the prompt alone (such as "{escaped(example)}"), by both. Higher is better for *both*. '
        "Under the prompt "
        f"the dial does **{ranged(found['held'], '.0%')}** of what it does without it, and {found['above']} of "
        f"{len(found['values'])} values end on the dial's side.",
        "",
        *table(["value", "dial", "prompt", "both"], rows),
    ]


def capability(report: Mapping[str, Any]) -> list[str]:
    """Accuracy on benchmarks."""
    if "capability" not in report:
        return []
    methods = report["capability"]["methods"]
    tasks = list(next(iter(methods.values())))
    rows = [
        [
            escaped(name),
            *(f"{shown(found[task]['points'], '+.1f')} ± {shown(found[task]['error'], '.1f')}" for task in tasks),
        ]
        for name, found in methods.items()
    ]
    first = next(iter(methods.values()))
    rows.insert(0, ["base model, accuracy", *(f"{first[task]['base']:.1%}" for task in tasks)])
    count = max(found["questions"] for found in first.values())
    return [
        "## Capability",
        "",
        f"Change of accuracy in percentage points at {sides_of(report)[0]}, the mean over the dialled values, ± "
        "its standard error; "
        f"the same {count} questions of each benchmark for all. Higher is better, 0 is no loss.",
        "",
        *table(["method", *map(escaped, tasks)], rows),
    ]


def wikitext(report: Mapping[str, Any]) -> list[str]:
    """Perplexity on WikiText."""
    if "wikitext" not in report:
        return []
    methods = report["wikitext"]["methods"]
    first = next(iter(methods.values()))
    rows = [
        [escaped(name), shown(found["ratio"], ".4f"), shown(found["kl"], ".4f")] for name, found in methods.items()
    ]
    return [
        "## WikiText",
        "",
        f"Perplexity on a text of {first['tokens']} tokens as a multiple of the base model's "
        f"({shown(first['base_perplexity'], '.2f')}), and the KL divergence there, at {sides_of(report)[0]}, the "
        "mean over the "
        "dialled values. Lower is better for both.",
        "",
        *table(["method", "perplexity", "KL"], rows),
    ]


def answers(report: Mapping[str, Any]) -> list[str]:
    """How generated answers read, and one of each value."""
    found = report.get("answers")
    if not found:
        return []
    columns = {"words": ".0f", "repeated": ".1%", "collapsed": ".0%", "empty": ".0%", "refused": ".0%", "ended": ".0%"}
    everyone = {"base model": found["base"], **found["methods"]}
    rows = [
        [escaped(name), *(shown(one["damage"][key], form) for key, form in columns.items())]
        for name, one in everyone.items()
    ]
    lines = [
        "## Generated answers",
        "",
        f"Answers to {len(found['base']['questions'])} questions at {sides_of(report)[0]}, all values together. "
        "*Words*: their "
        "mean length. *Repeated*: share of word sequences of four that come twice in an answer. *Collapsed*: "
        "answers that end "
        "in a loop. *Empty*, *refused*: answers without a word, or that decline. *Ended*: answers that came to an "
        "end within "
        "the limit. Good: as the base model, or less of everything but *ended*.",
        "",
        *table(["method", *columns], rows),
        "",
        f'To "{escaped(found["base"]["questions"][0])}":',
        "",
        f"- base model: {escaped(found['base']['answers'][0]['texts'][0], 400)}",
    ]
    for told in next(iter(found["methods"].values()))["answers"]:
        dials = ", ".join(f"{value} {strength:+g}" for value, strength in told["dials"].items())
        lines.append(f"- {escaped(dials)}: {escaped(told['texts'][0], 400)}")
    return lines


def judged(report: Mapping[str, Any]) -> list[str]:
    """What judges of generated answers say."""
    lines: list[str] = []
    for key in (key for key in report if key.startswith("judged_")):
        found = report[key]
        rows = [["base model", shown(found["base"]["csr"], ".0%"), "", ""]]
        for name, one in found["methods"].items():
            change = [None if end is None else 100 * end for end in one["csr_change"]]
            rows.append([escaped(name), shown(one["csr"], ".0%"), ranged(change, "+.1f"), str(one["unread"])])
        lines += [
            *([""] if lines else []),
            f"## Answers judged ({escaped(key.removeprefix('judged_'))})",
            "",
            "CSR by a judge: in how many generated answers the dialled value comes first "
            f"({escaped(found['base']['note'], 600)}). "
            "The change is in percentage points, **higher is better** at a positive strength. *Unread*: answers on "
            "which the "
            "judge gave no verdict.",
            "",
            *table(["method", "CSR", "change", "unread"], rows),
        ]
    return lines
