"""A table of methods as bars: every measure a column, every method a row."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from neva_hf.evaluation import plot_style as style
from neva_hf.evaluation.plot_methods import (
    MEASURES,
    NOTHING,
    Measure,
    MethodPoint,
    alt_text,
    interval,
    signs_of,
    way_text,
)


def method_bars(
    path: str | os.PathLike[str],
    table: Sequence[MethodPoint],
    *,
    title: str = "Methods beside each other",
    subtitle: str = "",
    highlight: str = "neuron map",
    columns: Sequence[str] = ("target", "nlr", "own_over_other"),
    measures: Mapping[str, Measure] | None = None,
) -> str:
    """Draws a bar with its interval and its number per method and measure.

    Methods stand in the order of the first measure, best first, for strengths above 0 and below alike. A bar that is
    long where less is better, far longer than the others, is cut, with an arrow; its number is written like all others.

    Args:
        path (`str` or `os.PathLike`): The PNG file to write.
        table (`Sequence[MethodPoint]`): Methods at their strengths.
        title (`str`): What stands over the picture.
        subtitle (`str`): The line below it, for the model, the KL divergence that all methods were calibrated to and the
            like.
        highlight (`str`): The method that the picture is about; the others are grey.
        columns (`Sequence[str]`): The measures, one column each.
        measures (`Mapping[str, Measure]`, *optional*): Measures that [`MEASURES`] does not have, or not so.

    Returns:
        `str`: Alt text.

    Raises:
        `NeVAError`: If the table is empty, or a measure is not described.

    Example:

    ```py
    >>> import tempfile
    >>> from neva_hf.evaluation.plots import MethodPoint, method_bars
    >>> table = [MethodPoint("neuron map", 1, {"nlr": 0.04}), MethodPoint("CAA", 1, {"nlr": 0.08})]
    >>> file = tempfile.mkdtemp() + "/bars.png"
    >>> "Least leakage (NLR): neuron map 0.04" in method_bars(file, table, columns=["nlr"])
    True
    ```
    """
    known = {**MEASURES, **(measures or {})}
    signs = signs_of(table, columns, known)
    order = _ordered(table, columns[0], known[columns[0]])
    with style.drawing() as figure:
        told = ". ".join(part for part in (subtitle.rstrip("."), "Lines: 95% intervals. Bold: the best") if part) + "."
        names = ["\n".join(style.wrapped(figure, method, 1.6, style.TEXT, "bold")) for method in order]
        lines = max(name.count("\n") + 1 for name in names)
        style.head(figure, (max(0.34, 0.17 * lines) * len(order) + 0.35) * len(signs) + 0.75, title, told)
        grid = figure.subplots(len(signs), len(columns), sharex="col", sharey=True, squeeze=False)
        figure.get_layout_engine().set(wspace=0.03, hspace=0.02)
        for row, sign in zip(grid, signs, strict=True):
            shown = {point.method: point for point in table if (point.strength > 0) == (sign > 0)}
            row[0].set_title(way_text(list(shown.values())), loc="left", weight="bold", pad=6)
            for axes, name in zip(row, columns, strict=True):
                found = [
                    interval(shown[method].measures.get(name)) if method in shown else NOTHING for method in order
                ]
                everywhere = [interval(point.measures.get(name)) for point in table]
                _bars(axes, order, found, _end(everywhere, known[name]), known[name], highlight)
            row[0].set_ylim(len(order) - 0.4, -0.6)
            row[0].set_yticks(range(len(order)), names, size=style.TEXT)
            for tick, method in zip(row[0].get_yticklabels(), order, strict=True):
                if method == highlight:
                    tick.set(weight="bold", color=style.FOCUS)
        beside = max(style.text_width(figure, line, style.TEXT, "bold") for name in names for line in name.split("\n"))
        for column, name in enumerate(columns):
            wide = (style.WIDTH - beside - 0.6) / len(columns)
            grid[-1][column].set_xlabel("\n".join(style.wrapped(figure, known[name].label, wide, style.TEXT)))
        return style.save(figure, path, alt_text(table, signs, columns, known))


def _bars(axes: Any, order: Sequence[str], found: Any, end: tuple[float, float], measure: Measure, ours: str) -> None:
    """One column of one sign."""
    from matplotlib.ticker import MaxNLocator

    low, high = end
    span = high - low
    axes.set_xlim(low - (0.3 * span if low < measure.neutral else 0), high + 0.3 * span)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.spines["left"].set_visible(False)
    axes.axvline(measure.neutral, color=style.SOFT, linewidth=0.8)
    numbers = [one[0] for one in found if not np.isnan(one[0])]
    best = (max(numbers) if measure.better == "more" else min(numbers)) if numbers else math.nan
    for place, (method, one) in enumerate(zip(order, found, strict=True)):
        if np.isnan(one[0]):
            axes.text(measure.neutral + 0.02 * span, place, "n/a", va="center", size=style.SMALL, color=style.SOFT)
            continue
        shown = [min(max(number, low), high) for number in one]
        axes.barh(
            place,
            shown[0] - measure.neutral,
            0.62,
            left=measure.neutral,
            color=style.FOCUS if method == ours else "#b9b9b9",
            zorder=2,
        )
        axes.plot(shown[1:], [place, place], color=style.INK, linewidth=1.2, zorder=3)
        cut = one[0] > high or one[0] < low
        text = f"{one[0]:.{measure.digits}f}".replace("-", "−") + (" →" if one[0] > high else "")
        text = f"← {text}" if one[0] < low else text
        left = one[0] < measure.neutral
        away = min(shown) - 0.03 * span if left else max(shown) + 0.03 * span
        weight = "bold" if one[0] == best and not cut and len(numbers) > 1 else "normal"
        axes.text(
            away, place, text, ha="right" if left else "left", va="center", size=style.SMALL, weight=weight, zorder=4
        )


def _end(found: Sequence[tuple[float, float, float]], measure: Measure) -> tuple[float, float]:
    """The ends of an axis: those of all bars and intervals, but no farther than 4 times the middle of the bars.

    Only what is worse for being longer is cut: a bar that leads by far is shown at its length.
    """
    away = np.array([one for one in found if not np.isnan(one[0])]).reshape(-1, 3) - measure.neutral
    if not away.size or not np.nanmax(np.abs(away)):
        return measure.neutral, measure.neutral + 1
    most = 4 * float(np.median(np.abs(away[:, 0]))) if measure.better == "less" else 0.0
    most = most or math.inf
    low, high = max(-most, min(0.0, float(np.nanmin(away)))), min(most, max(0.0, float(np.nanmax(away))))
    return measure.neutral + low, measure.neutral + high


def _ordered(table: Sequence[MethodPoint], name: str, measure: Measure) -> list[str]:
    """Methods, best first by the mean over their strengths; those without the measure last."""
    means = {}
    for method in dict.fromkeys(point.method for point in table):
        numbers = [interval(point.measures.get(name))[0] for point in table if point.method == method]
        numbers = [number for number in numbers if not np.isnan(number)]
        means[method] = float(np.mean(numbers)) if numbers else math.nan
    turn = -1 if measure.better == "more" else 1
    return sorted(means, key=lambda method: math.inf if np.isnan(means[method]) else turn * means[method])
