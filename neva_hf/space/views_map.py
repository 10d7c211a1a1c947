"""The neuron map as HTML: layers by neurons, overlap between values, one neuron. Texts go through `escape`, as in views."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .engine import Engine
from .insight import LayerNeurons, NeuronFacts
from .views import signed

_WIDTH, _LEFT, _ROW = 760.0, 44.0, 23.0  # of the picture, of its layer numbers, of a layer
_HUE = 250.0


def hue(engine: Engine, value: str) -> float:
    """The colour of a value, the same as on the circle."""
    return round((_HUE + 360 * engine.values.index(value) / len(engine.values)) % 360, 1)


def neuron_grid(engine: Engine, value: str, found: Sequence[LayerNeurons]) -> str:
    """The neurons of a value: a row per layer, a dot per neuron, larger for a larger shift.

    Args:
        engine ([`Engine`]): The page's model.
        value (`str`): The value.
        found (`Sequence[LayerNeurons]`): From [`insight.layers`].

    Returns:
        `str`: HTML with a picture whose dots can be clicked, and walked through with the arrow keys.
    """
    label, count = escape(engine.label(value)), sum(len(one.index) for one in found)
    if not count:
        return f'<p class="nv-status">{label} edits no neuron in this map.</p>'
    largest = max(abs(shift) for one in found for shift in one.shift) or 1.0
    height = _ROW * len(found) + 26
    drawn = []
    first = True
    for row, one in enumerate(found):
        y = _ROW * row + 16
        drawn.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y}" y2="{y}"/><text x="{_LEFT - 10}" y="{y + 4}">{one.layer}</text>'
        )
        size = max(one.size, max(one.index) + 1)
        for index, shift in zip(one.index, one.shift, strict=True):
            x = _LEFT + 8 + (_WIDTH - _LEFT - 16) * index / size
            radius = 2.2 + 4.3 * abs(shift) / largest
            kind = "nv-up" if shift >= 0 else "nv-down"
            drawn.append(
                f'<circle class="nv-neuron {kind}" cx="{x:.1f}" cy="{y}" r="{radius:.1f}" role="button" '
                f'tabindex="{0 if first else -1}" data-row="{row}" data-module="{escape(one.module)}" '
                f'data-index="{index}" aria-label="Layer {one.layer}, neuron {index}, shift {signed(shift)}"/>'
            )
            first = False
    return (
        f'<figure class="nv-map" style="--hue:{hue(engine, value)}"><svg viewBox="0 0 {_WIDTH:g} {height:g}" role="group" '
        f'aria-label="Neurons of {label}: the arrow keys walk through them, Enter chooses one">{"".join(drawn)}'
        f'<text class="nv-axis" x="{_LEFT + 8}" y="{height - 2}">neuron 0</text>'
        f'<text class="nv-axis nv-last" x="{_WIDTH - 8}" y="{height - 2}">{max(one.size for one in found) - 1}</text></svg>'
        f"<figcaption><b>{label}</b>: {count} neurons in {len(found)} layers (rows). A filled dot is pushed up at a "
        "positive strength, a ring is pushed down; larger is further. Choose one to read about it.</figcaption></figure>"
    )


def overlap_table(engine: Engine, shares: Sequence[Sequence[float]]) -> str:
    """Which values use the same neurons, in percent.

    Args:
        engine ([`Engine`]): The page's model.
        shares (`Sequence[Sequence[float]]`): From [`insight.overlap`].

    Returns:
        `str`: HTML with a table.
    """
    labels = [escape(engine.label(value)) for value in engine.values]
    head = "".join(f'<th scope="col"><span>{label}</span></th>' for label in labels)
    largest = max((share for i, row in enumerate(shares) for j, share in enumerate(row) if i != j), default=0) or 1.0
    rows = []
    for i, row in enumerate(shares):
        cells = "".join(
            '<td class="nv-own">·</td>'
            if i == j
            else f'<td style="--share:{share / largest:.2f}">{100 * share:.0f}</td>'
            for j, share in enumerate(row)
        )
        rows.append(f'<tr><th scope="row">{labels[i]}</th>{cells}</tr>')
    return (
        '<div class="nv-overlap" tabindex="0" role="region" aria-label="Overlap between values"><table>'
        "<caption>Neurons that two values share, in percent of those that either uses</caption>"
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def neuron_facts(engine: Engine, facts: NeuronFacts | None) -> str:
    """One neuron: its shift and place for every value, and the tokens that it speaks for.

    Args:
        engine ([`Engine`]): The page's model.
        facts ([`NeuronFacts`], *optional*): From [`insight.neuron`].

    Returns:
        `str`: HTML.
    """
    if facts is None:
        return '<div class="nv-facts nv-blank"><p>Choose a neuron in the picture.</p></div>'
    rows = "".join(
        f'<tr style="--hue:{hue(engine, value)}"><th scope="row"><span class="nv-swatch"></span>'
        f"{escape(engine.label(value))}</th><td>{_number(shift)}</td>"
        f"<td>{100 * facts.score[value]:.0f}%</td><td>{facts.rank[value]}</td></tr>"
        for value, shift in facts.shift.items()
    )
    return (
        f'<div class="nv-facts" role="status"><h2>Layer {facts.layer}, neuron {facts.index}</h2>'
        '<div class="nv-columns"><div><table><thead><tr><th scope="col">value</th><th scope="col">shift at +1</th>'
        '<th scope="col"><abbr title="how much its shift writes, of what the strongest neuron of the value writes">score'
        f'</abbr></th><th scope="col">rank</th></tr></thead><tbody>{rows}</tbody></table></div>'
        f"<div>{_tokens('Makes likelier', facts.promoted)}{_tokens('Makes less likely', facts.suppressed)}</div></div>"
        "<p>The tokens are those that its column of the down projection promotes and suppresses where the neuron is "
        "positive. Early layers hardly speak in tokens, late ones do.</p></div>"
    )


def _number(shift: float) -> str:
    return f"{'+' if shift > 0 else '−' if shift < 0 else ''}{abs(shift):.3g}"


def _tokens(title: str, tokens: Sequence[str]) -> str:
    listed = "".join(f"<li><code>{escape(token)}</code></li>" for token in tokens) or "<li>nothing</li>"
    return f'<h3>{title}</h3><ul class="nv-tokens">{listed}</ul>'
