"""Control against leakage and damage: which method steers most for the least."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from neva_hf.evaluation import plot_style as style
from neva_hf.evaluation.plot_labels import label_points
from neva_hf.evaluation.plot_methods import MEASURES, Measure, MethodPoint, alt_text, interval, signs_of, way_text


def control_against_damage(
    path: str | os.PathLike[str],
    points: Sequence[MethodPoint],
    *,
    title: str = "Control against leakage and damage",
    subtitle: str = "",
    highlight: str = "neuron map",
    control: str = "target",
    against: Sequence[str] = ("nlr", "perplexity_ratio"),
    measures: Mapping[str, Measure] | None = None,
) -> str:
    """Draws control against leakage, and against damage, a point with its intervals and its name per method.

    One row for strengths above 0 and one for those below, with the same axes. The better corner is marked.

    Args:
        path (`str` or `os.PathLike`): The PNG file to write.
        points (`Sequence[MethodPoint]`): Methods at their strengths.
        title (`str`): What stands over the picture.
        subtitle (`str`): The line below it, for the model, the KL divergence that all methods were calibrated to and the
            like.
        highlight (`str`): The method that the picture is about; the others are grey.
        control (`str`): The measure upwards.
        against (`Sequence[str]`): The measures sideways, one column each.
        measures (`Mapping[str, Measure]`, *optional*): Measures that [`MEASURES`] does not have, or not so.

    Returns:
        `str`: Alt text.

    Raises:
        `NeVAError`: If there are no points, or a measure is not described.

    Example:

    ```py
    >>> import tempfile
    >>> from neva_hf.evaluation.plots import MethodPoint, control_against_damage
    >>> points = [
    ...     MethodPoint("neuron map", 1, {"target": [0.35, 0.33, 0.38], "nlr": [0.04, 0.04, 0.06]}),
    ...     MethodPoint("CAA", 1, {"target": [0.27, 0.25, 0.28], "nlr": [0.08, 0.08, 0.09]}),
    ... ]
    >>> file = tempfile.mkdtemp() + "/methods.png"
    >>> alt = control_against_damage(file, points, against=["nlr"])
    >>> "Most control: neuron map 0.35" in alt
    True
    ```
    """
    known = {**MEASURES, **(measures or {})}
    signs = signs_of(points, [control, *against], known)
    with style.drawing() as figure:
        missing = _missing(points, [control, *against], known)
        told = ". ".join(part for part in (subtitle.rstrip("."), "Lines: 95% intervals", *missing) if part) + "."
        style.head(figure, 3.1 * len(signs) + 0.5, title, told)
        grid = figure.subplots(len(signs), len(against), sharex="col", sharey=True, squeeze=False)
        figure.get_layout_engine().set(wspace=0.04, hspace=0.04)
        for row, sign in zip(grid, signs, strict=True):
            shown = [point for point in points if (point.strength > 0) == (sign > 0)]
            for axes, measure in zip(row, against, strict=True):
                _scatter(axes, shown, measure, control, highlight)
            row[0].set_ylabel("\n".join(style.wrapped(figure, known[control].label, 2.6, style.TEXT)))
            row[0].set_title(way_text(shown), loc="left", weight="bold", pad=8)
        for column, measure in enumerate(against):
            grid[-1][column].set_xlabel("\n".join(style.wrapped(figure, known[measure].label, 3.2, style.TEXT)))
            _limits(grid[:, column], points, measure, control, known)
        for row in grid:
            for axes, measure in zip(row, against, strict=True):
                _better(axes, known[control].better, known[measure].better)
        figure.canvas.draw()  # labels go where they fit once the axes have their places
        figure.set_layout_engine("none")
        for row, sign in zip(grid, signs, strict=True):
            shown = [point for point in points if (point.strength > 0) == (sign > 0)]
            for axes, measure in zip(row, against, strict=True):
                _label(axes, shown, measure, control, highlight)
        return style.save(figure, path, alt_text(points, signs, [control, *against], known))


def _scatter(axes: Any, points: Sequence[MethodPoint], x: str, y: str, highlight: str) -> None:
    for point in points:
        across, up = interval(point.measures.get(x)), interval(point.measures.get(y))
        if np.isnan(across[0]) or np.isnan(up[0]):
            continue
        ours = point.method == highlight
        colour = style.FOCUS if ours else style.OTHERS
        axes.plot(across[1:], [up[0]] * 2, color=colour, linewidth=1.6, zorder=4 if ours else 3)
        axes.plot([across[0]] * 2, up[1:], color=colour, linewidth=1.6, zorder=4 if ours else 3)
        look = {"marker": "D" if ours else "o", "markersize": 7 if ours else 5.5, "markeredgewidth": 0}
        axes.plot([across[0]], [up[0]], color=colour, zorder=5, **look)
    axes.grid(color="#ececec", linewidth=0.7)
    axes.set_axisbelow(True)


def _limits(column: Any, points: Sequence[MethodPoint], x: str, y: str, known: Mapping[str, Measure]) -> None:
    """Limits of a column, logarithmic where one method is far beyond the others."""
    found = [interval(point.measures.get(x)) for point in points]
    numbers = np.array([number for number in found if not np.isnan(number[0])])
    if len(numbers):
        low, high = float(np.nanmin(numbers)), float(np.nanmax(numbers))
        if low > 0 and known[x].neutral == 0 and np.max(numbers[:, 0]) > 12 * np.min(numbers[:, 0]):
            for axes in column:
                axes.set_xscale("log")
                axes.xaxis.set_major_formatter(lambda number, _: f"{number:g}")
                axes.xaxis.set_minor_formatter("")
            column[0].set_xlim(low / 1.6, high * 1.6)
        else:
            low, high = min(low, known[x].neutral), max(high, known[x].neutral)
            room = 0.14 * (high - low or 1.0)
            column[0].set_xlim(low - (room if low < known[x].neutral else 0), high + room)
    ups = np.array([interval(point.measures.get(y)) for point in points])
    if np.isfinite(ups[:, 0]).any():
        low, high = min(0.0, float(np.nanmin(ups))), max(0.0, float(np.nanmax(ups)))
        room = 0.14 * (high - low or 1.0)
        column[0].set_ylim(low - (room if low < 0 else 0), high + room)


def _better(axes: Any, up: str, across: str) -> None:
    """Says in which corner the better methods are."""
    top, left = up == "more", across == "less"
    arrow = {(True, True): "↖", (True, False): "↗", (False, True): "↙", (False, False): "↘"}[top, left]
    axes.text(
        0.015 if left else 0.985,
        0.985 if top else 0.015,
        f"{arrow} better" if left else f"better {arrow}",
        transform=axes.transAxes,
        ha="left" if left else "right",
        va="top" if top else "bottom",
        size=style.SMALL,
        color=style.SOFT,
        style="italic",
    )


def _label(axes: Any, points: Sequence[MethodPoint], x: str, y: str, highlight: str) -> None:
    places, names, bars = [], [], []
    for point in points:
        across, up = interval(point.measures.get(x)), interval(point.measures.get(y))
        if np.isnan(across[0]) or np.isnan(up[0]):
            continue
        places.append((across[0], up[0]))
        names.append(point.method)
        low = max(across[1], axes.get_xlim()[0])
        bars += [((low, up[0]), (across[2], up[0])), ((across[0], up[1]), (across[0], up[2]))]
    ours = [name == highlight for name in names]
    colours = [style.FOCUS if mine else style.INK for mine in ours]
    label_points(axes, places, names, bars, size=style.TEXT, bold=ours, colours=colours)


def _missing(points: Sequence[MethodPoint], names: Sequence[str], known: Mapping[str, Measure]) -> list[str]:
    """Says which methods have no point, so that none is dropped in silence."""
    gone = [
        f"{point.method} at {style.strength_text(point.strength)} ({known[name].label.split(':')[0]})"
        for name in names
        for point in points
        if np.isnan(interval(point.measures.get(name))[0])
    ]
    return [f"No number, so no point: {', '.join(gone)}"] if gone else []
