"""A card as text: parts between markers, which are written anew, and all else, which is its owner's.

Also the tables and the escaping that the parts are made with. What comes from a map or a report is a stranger's text: it
goes into a card only through [`escape`], as a name that has a known form, or as a number.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

from .errors import NeVAError

_MARKER = re.compile(r"^[ \t]*<!-- neva:(begin|end) ([a-z]+) -->[ \t]*$", re.MULTILINE)
_REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}(/[A-Za-z0-9][A-Za-z0-9_.-]{0,95})?")
_SPECIAL = "\\`*_[]#~!|$"


def escape(text: object, most: int = 300) -> str:
    """A stranger's text as plain words of one line, for Markdown with HTML in it.

    Args:
        text (`object`): Anything.
        most (`int`): Characters that are kept.

    Returns:
        `str`: Neither markup, nor HTML, nor a link, nor a formula, nor a new line.

    Example:

    ```py
    >>> from neva_hf.card_text import escape
    >>> escape("<b>*hi*</b> | https://a.b")
    '&lt;b&gt;\\\\*hi\\\\*&lt;/b&gt; \\\\| https&#58;//a.b'
    ```
    """
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in str(text)).split())
    line = line if len(line) <= most else line[: most - 1] + "…"
    line = "".join(f"\\{sign}" if sign in _SPECIAL else sign for sign in line)
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # What some renderers make into links without being asked.
    line = line.replace("://", "&#58;//").replace("@", "&#64;")
    return re.sub(r"(?i)\bwww\.", lambda found: found[0][:-1] + "&#46;", line)


def is_repo_id(name: object) -> bool:
    """Whether a name has the form of a repository's id, and may stand in code and in links.

    Args:
        name (`object`): Such as `"user/name"`.

    Returns:
        `bool`: Whether it has.
    """
    return isinstance(name, str) and bool(_REPO_ID.fullmatch(name)) and ".." not in name and "--" not in name


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A Markdown table.

    Args:
        heads (`Sequence[str]`): The heading of each column.
        rows (`Sequence[Sequence[str]]`): Cells, escaped.
        words (`int`): How many columns, from the left, hold words; the others hold numbers.

    Returns:
        `str`: Its lines.
    """
    rule = ["---"] * words + ["---:"] * (len(heads) - words)
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, rule, *rows))


def fill(text: str, parts: Mapping[str, str]) -> str:
    """Puts parts between their markers.

    Args:
        text (`str`): A card, or the template.
        parts (`Mapping[str, str]`): Name -> Markdown.

    Returns:
        `str`: The card. What stands outside markers is as it was, and parts whose markers are gone stay out.

    Raises:
        `NeVAError`: If markers do not come in pairs.

    Example:

    ```py
    >>> from neva_hf.card_text import fill
    >>> print(fill("Mine.\\n<!-- neva:begin a -->\\nold\\n<!-- neva:end a -->", {"a": "new"}))
    Mine.
    <!-- neva:begin a -->
    new
    <!-- neva:end a -->
    ```
    """
    made, last = [], 0
    for name, start, end in _spans(text):
        made += [text[last:start], f"\n{parts[name]}\n" if name in parts else text[start:end]]
        last = end
    return "".join(made) + text[last:]


def free_text(text: str) -> str:
    """What is the owner's in a card's body: all but the parts, with white space evened out.

    Args:
        text (`str`): The body of a card.

    Returns:
        `str`: To be compared, not shown.

    Raises:
        `NeVAError`: If markers do not come in pairs.
    """
    kept, last = [], 0
    for name, start, end in _spans(text):
        kept += [text[last:start], f" {name} "]
        last = end
    return " ".join("".join([*kept, text[last:]]).split())


def has_parts(text: str) -> bool:
    """Whether a card has markers."""
    return _MARKER.search(text) is not None


def fingerprint(text: str) -> str:
    """The first digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _spans(text: str) -> list[tuple[str, int, int]]:
    """Name, start and end of what stands between the markers of each part."""
    spans: list[tuple[str, int, int]] = []
    opened: re.Match[str] | None = None
    for marker in _MARKER.finditer(text):
        kind, name = marker[1], marker[2]
        expected = "begin" if opened is None else "end"
        if kind != expected or (opened is not None and opened[2] != name):
            raise NeVAError(_broken(f"`<!-- neva:{kind} {name} -->` stands where a neva:{expected} was expected"))
        if opened is None:
            opened = marker
            continue
        if any(name == other for other, _, _ in spans):
            raise NeVAError(_broken(f"the part {name!r} stands in it twice"))
        spans.append((name, opened.end(), marker.start()))
        opened = None
    if opened is not None:
        raise NeVAError(_broken(f"the part {opened[2]!r} has no `<!-- neva:end {opened[2]} -->`"))
    return spans


def _broken(what: str) -> str:
    return (
        f"The card (README.md) cannot be written anew, since its markers do not fit: {what}. Mend it, or remove both "
        "markers of the part to keep its text as it is."
    )
