"""The sweep, the blind test and the code to take home as HTML. Texts go through `escape`, as in views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from .engine import Engine
from .views import prose, settings, signed
from .views_map import hue


def sweep(engine: Engine, value: str, strengths: Sequence[float], texts: Sequence[str], done: bool) -> str:
    """One question at several strengths of a dial, from the least to the most.

    Args:
        engine ([`Engine`]): The page's model.
        value (`str`): The dial.
        strengths (`Sequence[float]`): Its settings.
        texts (`Sequence[str]`): The answers so far.
        done (`bool`): Whether they are complete.

    Returns:
        `str`: HTML.
    """
    reach = max(abs(strength) for strength in strengths) or 1.0
    cursor = "" if done else '<span class="nv-cursor" aria-hidden="true"></span>'
    cards = "".join(
        f'<section class="nv-card nv-step" style="--share:{abs(strength) / reach:.2f}">'
        f"<header><div><h2>{signed(strength)}</h2><p>{'the base model' if not strength else escape(engine.label(value))}"
        f'</p></div></header><div class="nv-text">{prose(text)}{cursor}</div></section>'
        for strength, text in zip(strengths, texts, strict=True)
    )
    return f'<div class="nv-sweep" style="--hue:{hue(engine, value)}">{cards}</div>'


def blind(texts: Sequence[str], done: bool, verdict: str = "", edited_first: bool | None = None) -> str:
    """Two answers without names; with `edited_first`, which is which.

    Args:
        texts (`Sequence[str]`): What is shown as A and as B.
        done (`bool`): Whether they are complete.
        verdict (`str`): Whether the guess was right, in a sentence.
        edited_first (`bool`, *optional*): Whether A is the edited one, once the guess is made.

    Returns:
        `str`: HTML.
    """
    cursor = "" if done else '<span class="nv-cursor" aria-hidden="true"></span>'
    cards = []
    for place, text in enumerate(texts):
        known = edited_first is not None
        edited = known and edited_first == (place == 0)
        kind = "nv-edited" if edited else "nv-base" if known else "nv-hidden"
        under = ("with your dials" if edited else "as it is") if known else "which one is it?"
        cards.append(
            f'<section class="nv-card {kind}"><header><div><h2>Answer {"AB"[place]}</h2><p>{under}</p></div></header>'
            f'<div class="nv-text">{prose(text)}{cursor}</div></section>'
        )
    said = f'<p class="nv-verdict" role="status">{escape(verdict)}</p>' if verdict else ""
    return f'<div class="nv-talk"><div class="nv-pair">{"".join(cards)}</div>{said}</div>'


def code(engine: Engine, dials: Mapping[str, float], blocks: Sequence[tuple[str, str, str]]) -> str:
    """Code to copy.

    Args:
        engine ([`Engine`]): The page's model.
        dials (`dict[str, float]`): The dials that it is for.
        blocks (`Sequence[tuple[str, str, str]]`): Title, what it is for, and the code of each.

    Returns:
        `str`: HTML.
    """
    shown = "".join(
        f'<details class="nv-code"{" open" if place == 0 else ""}><summary><b>{escape(title)}</b> {escape(what)}</summary>'
        f'<div><button type="button" class="nv-copy" aria-label="Copy: {escape(title)}">Copy</button>'
        f'<pre tabindex="0" role="region" aria-label="{escape(title)}"><code>{escape(text)}</code></pre></div></details>'
        for place, (title, what, text) in enumerate(blocks)
    )
    return f'<div class="nv-take"><p>For {escape(settings(engine, dials))}:</p>{shown}</div>'
