"""Dose curves: what each strength of a dial does to its value, to the others, and what it costs."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from neva_hf.errors import NeVAError
from neva_hf.evaluation import plot_style as style
from neva_hf.values import ValueSystem

_ROW = 0.78  # inches


def dose_curves(
    path: str | os.PathLike[str],
    curves: Mapping[str, Any],
    *,
    title: str = "What each strength does",
    subtitle: str = "",
    ranges: Mapping[str, Sequence[float]] | None = None,
    system: ValueSystem | None = None,
    unit: str = "nats per token",
) -> str:
    """Draws a row per value: its margin with the other values' behind it, its leakage, and its KL divergence.

    All rows share their axes, so that steep and flat dials can be told at a glance. The numbers are those at +1 and -1,
    where these were measured.

    Args:
        path (`str` or `os.PathLike`): The PNG file to write.
        curves (`Mapping[str, Any]`): From [`identify.dose.dose_curves`], such as a map's `config.measurements["dose"]`:
            `{"strengths": [...], "curves": {value: {"kl": [...], "leakage": [...], "margins": {observed: [...]}}}}`.
            `None` stands for what could not be measured and leaves a gap.
        title (`str`): What stands over the picture.
        subtitle (`str`): The line below it, for the model, the number of scenarios and the like.
        ranges (`Mapping[str, Sequence[float]]`, *optional*): Value -> lowest and highest fluent strength, such as a map's
            `config.ranges`; shaded.
        system (`ValueSystem`, *optional*): Gives labels and the order of the circle.
        unit (`str`): The unit of margins and KL divergence.

    Returns:
        `str`: Alt text.

    Raises:
        `NeVAError`: If a list does not go along the strengths, or there are no curves.

    Example:

    ```py
    >>> import tempfile
    >>> from neva_hf.evaluation.plots import dose_curves
    >>> curve = {"kl": [0.05, 0.05], "leakage": [0.2, 0.1], "margins": {"calm": [-0.4, 0.5], "mirth": [-0.08, 0.05]}}
    >>> file = tempfile.mkdtemp() + "/dose.png"
    >>> alt = dose_curves(file, {"strengths": [-1.0, 1.0], "curves": {"calm": curve}})
    >>> "Calm: margin -0.40 at -1 and +0.50 at +1" in alt.replace("−", "-")
    True
    ```
    """
    strengths, each = _checked(curves)
    names = list(each)
    names = [names[place] for place in style.in_circle_order(names, system)]
    ranges = {name: ends for name, ends in (ranges or {}).items() if name in each and len(ends) == 2}
    low = min([strengths[0], 0.0, *(float(ends[0]) for ends in ranges.values())])
    high = max([strengths[-1], 0.0, *(float(ends[1]) for ends in ranges.values())])
    gap = 0.04 * (high - low)
    with style.drawing() as figure:
        notes = "Numbers: at " + " and ".join(style.strength_text(at) for at in _units(strengths)) + "."
        notes = notes if _units(strengths) else ""
        if ranges:
            notes = f"Blue background: strengths at which text stays fluent. {notes}"
        style.head(figure, _ROW * len(names) + 1.1, title, f"{subtitle.rstrip('.')}. {notes}" if subtitle else notes)
        grid = figure.subplots(len(names), 3, sharex=True, sharey="col", squeeze=False, width_ratios=[1.35, 1, 1])
        figure.get_layout_engine().set(hspace=0.0, wspace=0.03)
        for row, name in zip(grid, names, strict=True):
            for axes in row:
                if name in ranges:
                    axes.axvspan(*map(float, ranges[name]), color=style.FLUENT, linewidth=0, zorder=0)
                axes.axvline(0, color=style.FAINT, linewidth=0.8, zorder=1)
                axes.axhline(0, color=style.FAINT, linewidth=0.8, zorder=1)
                axes.tick_params(length=2)
            _row(row, name, strengths, each[name])
            lines = style.wrapped(figure, style.label(name, system), 1.5, style.TEXT, "bold")
            row[0].set_ylabel("\n".join(lines), rotation=0, ha="right", va="center", weight="bold", labelpad=6)
        headings = (
            f"margin, {unit}\n(thin: the other values)",
            "leakage (NLR): others'\nshift over its own",
            f"KL divergence from the\nbase model, {unit}",
        )
        for column, heading in enumerate(headings):
            grid[0][column].set_title(heading, size=style.TEXT, pad=8)
            grid[-1][column].set_xlabel("strength")
            grid[-1][column].set_xticks([at for at in sorted({*strengths, 0.0}) if at == int(at)])
        grid[0][0].set_xlim(low - gap, high + gap)
        for column in (1, 2):
            grid[0][column].set_ylim(bottom=0, top=grid[0][column].get_ylim()[1] * 1.25)
        bottom, top = grid[0][0].get_ylim()
        grid[0][0].set_ylim(bottom - 0.12 * (top - bottom), top + 0.12 * (top - bottom))
        return style.save(figure, path, _alt(strengths, {name: each[name] for name in names}, ranges, system, unit))


def _checked(curves: Mapping[str, Any]) -> tuple[list[float], dict[str, dict[str, Any]]]:
    """Ascending strengths, and value -> arrays along them with NaN for gaps."""
    strengths = [float(strength) for strength in curves.get("strengths", ())]
    if not strengths or not curves.get("curves"):
        raise NeVAError("There is no curve to draw: `strengths` and `curves` must hold at least one each.")
    order = np.argsort(strengths)

    def numbers(points: Any, what: str) -> Any:
        found = np.array(points, dtype=float)
        if found.shape != (len(strengths),):
            raise NeVAError(f"The dose curve of {what:.160} must hold {len(strengths)} numbers, got {found.shape}.")
        return np.where(np.isfinite(found), found, np.nan)[order]

    each = {
        value: {
            "kl": numbers(curve["kl"], f"{value}, KL divergence"),
            "leakage": numbers(curve["leakage"], f"{value}, leakage"),
            "margins": {seen: numbers(points, f"{value} on {seen}") for seen, points in curve["margins"].items()},
        }
        for value, curve in curves["curves"].items()
    }
    return [strengths[place] for place in order], each


def _units(strengths: Sequence[float]) -> list[float]:
    return [at for at in (-1.0, 1.0) if at in strengths]


def _row(row: Any, name: str, strengths: Sequence[float], curve: Mapping[str, Any]) -> None:
    """Margins, leakage and KL divergence of one value."""
    negative = sum(at < 0 for at in strengths)
    xs = np.array([*strengths[:negative], 0.0, *strengths[negative:]])

    def through_zero(points: Any, at_zero: float = 0.0) -> Any:
        return np.insert(points, negative, at_zero)

    for seen, points in curve["margins"].items():
        if seen != name:
            row[0].plot(xs, through_zero(points), color="#9a9a9a", linewidth=0.7, zorder=2)
    dots = {"color": style.FOCUS, "linewidth": 1.8, "marker": "o", "markersize": 3, "zorder": 3, "clip_on": False}
    if name in curve["margins"]:
        row[0].plot(xs, through_zero(curve["margins"][name]), **dots)
    # At 0 nothing moves, so there is no share of it: the curve is open there.
    row[1].plot(xs, through_zero(curve["leakage"], math.nan), **dots)
    row[2].plot(xs, through_zero(curve["kl"]), **dots)
    for axes, points in zip(row, (curve["margins"].get(name), curve["leakage"], curve["kl"]), strict=True):
        for at in _units(strengths) if points is not None else []:
            number = points[list(strengths).index(at)]
            if not np.isnan(number):
                # Where curves leave room: above a rising line left of the point, in the hollow of the KL divergence.
                side = {"ha": "left" if at < 0 else "right", "xytext": (-3 * at, 4 * (at if axes is row[0] else 1))}
                if axes is row[1]:
                    side = {"ha": "center", "xytext": (0, 4)}
                axes.annotate(
                    style.signed(number) if axes is row[0] else f"{number:.2f}",
                    (at, number),
                    textcoords="offset points",
                    va="top" if axes is row[0] and at < 0 else "bottom",
                    size=style.SMALL,
                    zorder=5,
                    **side,
                )


def _alt(
    strengths: Sequence[float],
    each: Mapping[str, Mapping[str, Any]],
    ranges: Mapping[str, Sequence[float]],
    system: ValueSystem | None,
    unit: str,
) -> str:
    said = [
        f"Curves over the strength of the dial, from {style.strength_text(strengths[0])} to "
        f"{style.strength_text(strengths[-1])}, one row per value: margin and KL divergence in {unit}, and leakage."
    ]
    for name, curve in list(each.items())[:12]:  # more would be no summary
        own = curve["margins"].get(name)
        found = []
        for at in _units(strengths) or [strengths[0], strengths[-1]]:
            place = list(strengths).index(at)
            if own is not None and not np.isnan(own[place]):
                found.append(f"{style.signed(own[place])} at {style.strength_text(at)}")
        if found:
            said.append(f"{style.label(name, system)}: margin {' and '.join(found)}.")
    leaks = {name: float(np.nanmax(c["leakage"])) for name, c in each.items() if np.isfinite(c["leakage"]).any()}
    if leaks:
        worst = max(leaks, key=lambda name: leaks[name])
        at = strengths[int(np.nanargmax(each[worst]["leakage"]))]
        said.append(
            f"The largest leakage is {leaks[worst]:.2f}, of {style.label(worst, system)} at {style.strength_text(at)}."
        )
    if ranges:
        low, high = max(float(ends[0]) for ends in ranges.values()), min(float(ends[1]) for ends in ranges.values())
        said.append(f"All shaded values stay fluent from {style.strength_text(low)} to {style.strength_text(high)}.")
    return " ".join(said)
