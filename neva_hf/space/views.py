"""The answers, gauges and sentences of the page as HTML.

Invariant: every text that comes from a visitor, a map or a model goes through `escape` here, and nowhere does the page
make HTML of such a text elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from .engine import Engine
from .insight import UNIT_KL, Expected
from .state import Dials

_WORD = re.compile(r"\S+")
_BOLD = re.compile(r"\*\*(?=\S)([^*\n]+?)(?<=\S)\*\*")
_MOST_DOSE = 8 * UNIT_KL  # where the gauge ends


@dataclass(frozen=True)
class Said:
    """A question with both answers, as the page shows them.

    Args:
        question (`str`): What was asked.
        dials (`dict[str, float]`): How the dials stood.
        base (`str`): The base model's answer so far.
        edited (`str`): The edited one's.
        done (`bool`): Whether they are complete.
        note (`str`): Why they ended early, in a sentence.
    """

    question: str
    dials: Dials = field(default_factory=dict)
    base: str = ""
    edited: str = ""
    done: bool = False
    note: str = ""


def signed(strength: float) -> str:
    """A strength as people read it.

    Example:

    ```py
    >>> signed(1.5), signed(-0.25), signed(0.0)
    ('+1.5', '−0.25', '0')
    ```
    """
    return f"{'+' if strength > 0 else '−' if strength < 0 else ''}{round(abs(strength), 2):g}"


def settings(engine: Engine, dials: Mapping[str, float]) -> str:
    """Dials in words, plain text: `Benevolence +1.5, Power −0.5`."""
    return ", ".join(f"{engine.label(name)} {signed(s)}" for name, s in dials.items() if s) or "all dials at 0"


def parting(base: str, edited: str, done: bool = True) -> int | None:
    """Where two answers begin to differ: the start of the word in which they do.

    Args:
        base (`str`): One answer.
        edited (`str`): The other.
        done (`bool`): Whether both are complete; before that, one that is only shorter does not differ yet.

    Returns:
        `int` or `None`: A place in both texts, or `None` where they do not differ.

    Example:

    ```py
    >>> parting("Stay at home.", "Stay and help.")
    5
    >>> parting("Stay at", "Stay at home", done=False) is None
    True
    ```
    """
    if base == edited:
        return None
    shared = min(len(base), len(edited))
    same = next((place for place in range(shared) if base[place] != edited[place]), shared)
    if same == shared and not done:
        return None
    while same > 0 and not base[same - 1].isspace():
        same -= 1
    return same


def prose(text: str) -> str:
    """A model's text as HTML: escaped, with what it writes between two stars in bold.

    Example:

    ```py
    >>> prose("<b> is **bold**")
    '&lt;b&gt; is <strong>bold</strong>'
    ```
    """
    return _BOLD.sub(r"<strong>\1</strong>", escape(text))


def _answer(text: str, place: int | None) -> str:
    """A text whose first words are those of the other answer, and where the two part."""
    if place is None:
        return prose(text)
    first = _WORD.match(text, place)
    end = first.end() if first else place
    word = f'<mark title="Here the answers begin to differ">{escape(text[place:end])}</mark>' if first else ""
    shared = f'<span class="nv-same">{prose(text[:place])}</span>' if place else ""
    return f"{shared}{word}{prose(text[end:])}"


def _card(kind: str, title: str, under: str, body: str, waiting: bool) -> str:
    copy = '<button type="button" class="nv-copy" aria-label="Copy this answer">Copy</button>' if body else ""
    cursor = '<span class="nv-cursor" aria-hidden="true"></span>' if waiting else ""
    return (
        f'<section class="nv-card nv-{kind}"><header><div><h2>{title}</h2><p>{under}</p></div>{copy}</header>'
        f'<div class="nv-text">{body}{cursor}</div></section>'
    )


def conversation(engine: Engine, said: Sequence[Said]) -> str:
    """Both chats side by side, one row per question.

    Args:
        engine ([`Engine`]): The page's model.
        said (`Sequence[Said]`): The conversation so far.

    Returns:
        `str`: HTML.
    """
    model = escape(_last_part(engine.base_name))
    if not said:
        left = _card("base", "As it is", model, '<span class="nv-empty">The answer without any edit.</span>', False)
        right = _card(
            "edited",
            "With your dials",
            "a few hundred of its neurons edited",
            '<span class="nv-empty">The same model, the same question, the same seed: only the dials differ.</span>',
            False,
        )
        blank = f'<div class="nv-pair">{left}{right}</div>'.replace(
            '<button type="button" class="nv-copy" aria-label="Copy this answer">Copy</button>', ""
        )
        return f'<div class="nv-talk nv-blank">{blank}</div>'
    rows = []
    for one in said:
        place = parting(one.base, one.edited, one.done)
        left = _card("base", "As it is", model, _answer(one.base, place), not one.done)
        right = _card(
            "edited", "With your dials", escape(settings(engine, one.dials)), _answer(one.edited, place), not one.done
        )
        same = one.done and place is None and one.base != ""
        notes = [one.note] if one.note else []
        if same:
            notes.append("Both answers are the same. Turn a dial further, or ask something where values matter.")
        note = f'<p class="nv-end">{escape(" ".join(notes))}</p>' if notes else ""
        rows.append(
            f'<article class="nv-turn"><p class="nv-asked"><span class="nv-who">You</span> {escape(one.question)}</p>'
            f'<div class="nv-pair">{left}{right}</div>{note}</article>'
        )
    return f'<div class="nv-talk" tabindex="0" role="region" aria-label="The conversation">{"".join(rows)}</div>'


def sentence(text: str) -> str:
    """An error, as a sentence in the page; nothing for an empty one."""
    return f'<p class="nv-error" role="alert">{escape(" ".join(text.split()))}</p>' if text else ""


def status(text: str) -> str:
    """What is going on, for eyes and for screen readers."""
    return f'<p class="nv-status" role="status">{escape(text)}</p>'


def gauge(engine: Engine, dials: Mapping[str, float], expected: Expected | None) -> str:
    """What the dials cost and what they move along, in a gauge and two sentences.

    Args:
        engine ([`Engine`]): The page's model.
        dials (`dict[str, float]`): The dials.
        expected ([`Expected`], *optional*): From [`insight.expected_of`].

    Returns:
        `str`: HTML.
    """
    if expected is None:
        return '<div class="nv-gauge"><p>This map was saved without dose curves: what its dials do is not known.</p></div>'
    share = min(1.0, expected.kl / _MOST_DOSE)
    words = dose_word(expected.kl)
    ticks = "".join(
        f'<span class="nv-at" style="left:{100 * kl / _MOST_DOSE:.1f}%">{name}</span>'
        for kl, name in ((UNIT_KL, "one dial at 1"), (4 * UNIT_KL, "at 2"))
    )
    more = " or more" if expected.beyond else ""
    meter = (
        f'<div class="nv-dose" role="meter" aria-label="Dose: damage to neutral text" aria-valuemin="0" '
        f'aria-valuemax="{_MOST_DOSE:g}" aria-valuenow="{min(expected.kl, _MOST_DOSE):.3f}" '
        f'aria-valuetext="{words}, KL {expected.kl:.3f} nats per token{more}">'
        f'<span class="nv-level" style="width:{100 * share:.1f}%"></span>{ticks}</div>'
    )
    dose = (
        f"<b>Dose: {words}.</b> KL {expected.kl:.3f} nats per token{more}, what one dial at {expected.strength:.1f} costs."
        if dials
        else "<b>Dose: none.</b> With all dials at 0 both answers are the same, bit for bit."
    )
    return f'<div class="nv-gauge">{meter}<p>{dose}</p><p>{_leakage(engine, dials, expected)}</p></div>'


def dose_word(kl: float) -> str:
    """A dose in a word: from what one dial at 1, 2 and 2.5 costs."""
    for limit, word in ((0.001, "none"), (1.2, "gentle"), (3.0, "clear"), (6.5, "strong")):
        if kl < limit * (UNIT_KL if limit != 0.001 else 1):
            return word
    return "too strong, the text suffers"


def _leakage(engine: Engine, dials: Mapping[str, float], expected: Expected) -> str:
    if not dials:
        return "Choose a character above, or drag a value."
    moved = ", ".join(f"{escape(engine.label(name))} {signed(shift)}" for name, shift in expected.control.items())
    if expected.leakage is None:
        return f"<b>Expected:</b> {moved} nats per token. The dialled values do not move as they are turned."
    others = sorted(expected.others.items(), key=lambda pair: -abs(pair[1]))[:1]
    most = f"; {escape(engine.label(others[0][0]))} moves most ({signed(others[0][1])})" if others else ""
    return (
        f"<b>Expected:</b> {moved} nats per token. <b>Leakage {100 * expected.leakage:.0f}%</b>: so much of it goes, on "
        f"average, to each of the other values{most}."
    )


def _last_part(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1]
