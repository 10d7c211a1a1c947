"""The neuron map as HTML: layers by neurons, overlap between values, one neuron. Texts go through `escape`, as in views."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .engine import Engine
from .insight import LayerNeurons, NeuronFacts
from .views import signed

_WIDTH, _LEFT, _ROW = 760.0, 44.0, 23.0  # of the picture, of its layer numbers, of a layer
_HUE = 250.0
_EDIT = (
    "<p>At +1 its activation is multiplied by the first number, its gain, and the second, its shift, is added. The score "
    "counts both: how much the shift writes, and how much the gain writes if all neurons are equally active, each as a "
    "share of the value's largest, added up. How active a neuron really is, the map does not say.</p>"
)


def hue(engine: Engine, value: str) -> float:
    """The colour of a value, the same as on the circle."""
    return round((_HUE + 360 * engine.values.index(value) / len(engine.values)) % 360, 1)


def neuron_grid(engine: Engine, value: str, found: Sequence[LayerNeurons]) -> str:
    """The neurons of a value: a row per layer, a dot per neuron, larger where it is edited more.

    That is by the size of its shift; with gains, by the sizes of its shift and of its gain, each as a share of the
    largest among the value's neurons, added up.

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
    gains = engine.map.config.use_gain
    amounts = _amounts(found)
    largest = max(amount for row in amounts for amount in row) or 1.0
    height = _ROW * len(found) + 26
    drawn = []
    first = True
    for row, one in enumerate(found):
        y = _ROW * row + 16
        drawn.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y}" y2="{y}"/><text x="{_LEFT - 10}" y="{y + 4}">{one.layer}</text>'
        )
        size = max(one.size, max(one.index) + 1)
        for index, shift, gain, amount in zip(one.index, one.shift, one.gain, amounts[row], strict=True):
            x = _LEFT + 8 + (_WIDTH - _LEFT - 16) * index / size
            radius = 2.2 + 4.3 * amount / largest
            kind = "nv-up" if (shift or gain) >= 0 else "nv-down"
            told = f"{f'activation {_times(gain)}, ' if gains else ''}shift {signed(shift)}"
            drawn.append(
                f'<circle class="nv-neuron {kind}" cx="{x:.1f}" cy="{y}" r="{radius:.1f}" role="button" '
                f'tabindex="{0 if first else -1}" data-row="{row}" data-module="{escape(one.module)}" '
                f'data-index="{index}" aria-label="Layer {one.layer}, neuron {index}, {told}"/>'
            )
            first = False
    return (
        f'<figure class="nv-map" style="--hue:{hue(engine, value)}"><svg viewBox="0 0 {_WIDTH:g} {height:g}" role="group" '
        f'aria-label="Neurons of {label}: the arrow keys walk through them, Enter chooses one">{"".join(drawn)}'
        f'<text class="nv-axis" x="{_LEFT + 8}" y="{height - 2}">neuron 0</text>'
        f'<text class="nv-axis nv-last" x="{_WIDTH - 8}" y="{height - 2}">{max(one.size for one in found) - 1}</text></svg>'
        f"<figcaption><b>{label}</b>: {count} neurons in {len(found)} layers (rows). {_legend(found, gains)} "
        "Choose one to read about it.</figcaption></figure>"
    )


def _amounts(found: Sequence[LayerNeurons]) -> list[list[float]]:
    """How much each neuron is edited, per layer: shift and gain, each as a share of the largest, added up."""
    shift = max(abs(shift) for one in found for shift in one.shift) or 1.0
    gain = max(abs(gain) for one in found for gain in one.gain) or 1.0
    return [[abs(s) / shift + abs(g) / gain for s, g in zip(one.shift, one.gain, strict=True)] for one in found]


def _legend(found: Sequence[LayerNeurons], gains: bool) -> str:
    if not gains:
        return "A filled dot is pushed up at a positive strength, a ring is pushed down; larger is further."
    alone = any(not shift for one in found for shift in one.shift)
    without = " (without a shift: its activation grows, or shrinks)" if alone else ""
    return (
        f"At a positive strength, a filled dot is shifted up and a ring down{without}, and activations are multiplied. "
        "Larger is edited more: shift and gain, each as a share of the value's largest, added up."
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
    """One neuron: its shift, its gain and its place for every value, and the tokens that it speaks for.

    Args:
        engine ([`Engine`]): The page's model.
        facts ([`NeuronFacts`], *optional*): From [`insight.neuron`].

    Returns:
        `str`: HTML.
    """
    if facts is None:
        return '<div class="nv-facts nv-blank"><p>Choose a neuron in the picture.</p></div>'
    gains = engine.map.config.use_gain
    rows = "".join(
        f'<tr style="--hue:{hue(engine, value)}"><th scope="row"><span class="nv-swatch"></span>'
        f"{escape(engine.label(value))}</th><td>{_edit(facts.gain[value], shift) if gains else _number(shift)}</td>"
        f"<td>{100 * facts.score[value]:.0f}%</td><td>{facts.rank[value]}</td></tr>"
        for value, shift in facts.shift.items()
    )
    return (
        f'<div class="nv-facts" role="status"><h2>Layer {facts.layer}, neuron {facts.index}</h2>'
        '<div class="nv-columns"><div><table><thead><tr><th scope="col">value</th>'
        f'<th scope="col">{"activation" if gains else "shift"} at +1</th>'
        f'<th scope="col"><abbr title="how much its {"edit" if gains else "shift"} writes, of what the strongest neuron of '
        f'the value writes">score</abbr></th><th scope="col">rank</th></tr></thead><tbody>{rows}</tbody></table></div>'
        f"<div>{_tokens('Makes likelier', facts.promoted)}{_tokens('Makes less likely', facts.suppressed)}</div></div>"
        "<p>The tokens are those that its column of the down projection promotes and suppresses where the neuron is "
        f"positive. Early layers hardly speak in tokens, late ones do.</p>{_EDIT if gains else ''}</div>"
    )


def _edit(gain: float, shift: float) -> str:
    # (a line may end between the two, not within one)
    added = f"{'−' if shift < 0 else '+'} {abs(shift):.3g}"
    return f'<span class="nv-term">{_times(gain)}</span> <span class="nv-term">{added}</span>'


def _times(gain: float) -> str:
    factor = round(1 + gain, 3)
    return f"× {'−' if factor < 0 else ''}{abs(factor):g}"


def _number(shift: float) -> str:
    return f"{'+' if shift > 0 else '−' if shift < 0 else ''}{abs(shift):.3g}"


def _tokens(title: str, tokens: Sequence[str]) -> str:
    listed = "".join(f"<li><code>{escape(token)}</code></li>" for token in tokens) or "<li>nothing</li>"
    return f'<h3>{title}</h3><ul class="nv-tokens">{listed}</ul>'
