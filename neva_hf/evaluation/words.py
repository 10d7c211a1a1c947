"""Small parts of Markdown: numbers with intervals, tables, and texts that come from strangers' files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def escaped(text: object, most: int = 200) -> str:
    """A text from a stranger's file as plain Markdown text in one line.

    Example:

    ```py
    >>> from neva_hf.evaluation.markdown import escaped
    >>> escaped("a|b <img src=x> [c](d)")
    'a\\\\|b &lt;img src=x&gt; \\\\[c\\\\](d)'
    ```
    """
    line = "".join(sign if sign.isprintable() else " " for sign in str(text))[:most]
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{sign}" if sign in "\\|`*[]_#~!" else sign for sign in line)


def shown(number: float | None, form: str = ".3f") -> str:
    """A number, or `n/a` where it is not defined."""
    if number is None:
        return "n/a"
    text = f"{number:{form}}"
    # (what rounds to nothing has no sign)
    return text if any(sign in "123456789" for sign in text) else text.replace("-", "+" if "+" in form else "")


def ranged(found: Sequence[float | None] | None, form: str = ".3f") -> str:
    """`0.310 [0.280, 0.350]`; an end that does not exist is `?`."""
    if found is None or found[0] is None:
        return "n/a"
    low, high = ("?" if end is None else shown(end, form) for end in found[1:])
    return f"{shown(found[0], form)} [{low}, {high}]"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> list[str]:
    """A Markdown table; the first columns are words, the others numbers."""
    rule = ["---"] * words + ["---:"] * (len(heads) - words)
    return [f"| {' | '.join(row)} |" for row in (heads, rule, *rows)]


def sides_of(report: Mapping[str, Any]) -> list[str]:
    return [f"{strength:+g}" for strength in report["strengths"]]


def first_of(report: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    name = next(iter(report["methods"]))
    return name, report["methods"][name]["strengths"]
