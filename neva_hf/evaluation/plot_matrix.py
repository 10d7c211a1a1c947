"""The leakage matrix: what dialling each value does to every value."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from neva_hf.errors import NeVAError
from neva_hf.evaluation import plot_style as style
from neva_hf.values import ValueSystem

_MOST_NUMBERS = 24  # columns; beyond, numbers would be too small to be read


def leakage_matrix(
    path: str | os.PathLike[str],
    shifts: ArrayLike,
    targets: Sequence[str],
    observed: Sequence[str],
    *,
    title: str = "What each dial moves",
    subtitle: str = "",
    intervals: ArrayLike | None = None,
    system: ValueSystem | None = None,
    strength: float = 1.0,
    quantity: str = "shift of the margin",
    unit: str = "nats per token",
) -> str:
    """Draws a heat map of shifts, target x observed, with the number in every cell.

    The colours are linear and centred at 0. The dialled value's own cell is outlined, the largest leak of each row (the
    other value that went farthest the way the target was dialled) is bold. Values stand in the order of the circle where
    the system has one, with their groups marked.

    Args:
        path (`str` or `os.PathLike`): The PNG file to write.
        shifts (array-like): `[targets, observed]`, what was measured at `strength` minus at 0, with its sign as measured
            (a value that is dialled down falls). NaN where nothing was measured: the cell stays empty.
        targets (`Sequence[str]`): The dialled values, one per row.
        observed (`Sequence[str]`): The observed values, one per column.
        title (`str`): What stands over the picture.
        subtitle (`str`): The line below it, for the model, the number of scenarios and the like.
        intervals (array-like, *optional*): `[targets, observed, 2]`, lower and upper ends of the shifts' intervals. A
            number is grey where its interval holds 0.
        system (`ValueSystem`, *optional*): Gives labels, groups and the circle. Without it names are shown as given.
        strength (`float`): The strength of the dials, of which the sign says which way is a leak.
        quantity (`str`): What the numbers are.
        unit (`str`): Their unit.

    Returns:
        `str`: Alt text.

    Raises:
        `NeVAError`: If the shapes do not fit.

    Example:

    ```py
    >>> import tempfile
    >>> from neva_hf.evaluation.plots import leakage_matrix
    >>> file = tempfile.mkdtemp() + "/matrix.png"
    >>> alt = leakage_matrix(file, [[0.4, 0.1], [-0.02, 0.3]], ["calm", "mirth"], ["calm", "mirth"])
    >>> "The largest leak: dialling Calm moves Mirth by +0.10." in alt
    True
    ```
    """
    table, reach = _checked(shifts, targets, observed, intervals)
    rows, columns = style.in_circle_order(targets, system), style.in_circle_order(observed, system)
    targets, observed = [targets[row] for row in rows], [observed[column] for column in columns]
    table = table[np.ix_(rows, columns)]
    unsure = np.zeros(table.shape, dtype=bool)
    if reach is not None:
        reach = reach[np.ix_(rows, columns)]
        unsure = (reach[..., 0] <= 0) & (reach[..., 1] >= 0)
    bound = float(np.nanmax(np.abs(table))) if np.isfinite(table).any() else 0.0
    bound = bound or 1.0

    with style.drawing() as figure:
        notes = "Outlined: the dialled value itself. Bold: the largest leak of its row."
        if unsure.any():
            notes += " Grey: the 95% interval holds 0."
        if np.isnan(table).any():
            notes += " Hatched: not measured."
        size = style.TEXT if max(table.shape) <= _MOST_NUMBERS else style.SMALL
        beside = max(style.text_width(figure, style.label(name, system), size) for name in targets)
        width = style.WIDTH - beside - (1.75 if system is not None and system.groups else 0.7)
        cell = min(0.42, max(0.19, width / len(observed)))
        style.head(
            figure, 1.95 + cell * len(targets), title, f"{subtitle.rstrip('.')}. {notes}" if subtitle else notes
        )
        axes = figure.add_subplot()
        axes.patch.set(facecolor="white", edgecolor=style.FAINT, hatch="//////", linewidth=0)
        mesh = axes.pcolormesh(
            np.ma.masked_invalid(table),
            cmap=style.DIVERGING,
            vmin=-bound,
            vmax=bound,
            edgecolor="white",
            linewidth=1.2,
        )
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labeltop=True, labelbottom=False)
        if len(observed) < 5:
            axes.set_box_aspect(cell * len(targets) / (1.3 * len(observed)))
        tilt = {"rotation": 40, "ha": "left", "rotation_mode": "anchor"} if len(observed) > 3 else {}
        axes.set_xticks(
            np.arange(len(observed)) + 0.5, [style.label(name, system) for name in observed], size=size, **tilt
        )
        axes.set_yticks(np.arange(len(targets)) + 0.5, [style.label(name, system) for name in targets], size=size)
        axes.set_ylabel(f"value dialled to {style.strength_text(strength)}", labelpad=8)
        axes.set_xlabel("value observed", labelpad=8)
        axes.xaxis.set_label_position("top")
        _cells(axes, mesh, table, targets, observed, unsure, strength, bound)
        _groups(axes, targets, observed, system, width)
        bar = figure.colorbar(mesh, ax=axes, orientation="horizontal", shrink=0.55, aspect=38, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label(f"{quantity}, {unit}  (orange: rises, purple: falls)")
        return style.save(figure, path, _alt(table, targets, observed, system, strength, quantity, unit))


def _checked(shifts: Any, targets: Any, observed: Any, intervals: Any) -> tuple[Any, Any]:
    table, shape = np.array(shifts, dtype=float), (len(targets), len(observed))
    if table.shape != shape or 0 in shape:
        raise NeVAError(
            f"`shifts` must have a row per target and a column per observed value, {shape}, got {table.shape}."
        )
    table[~np.isfinite(table)] = np.nan
    reach = None if intervals is None else np.array(intervals, dtype=float)
    if reach is not None and reach.shape != (*shape, 2):
        raise NeVAError(f"`intervals` must hold two ends for each shift, {(*shape, 2)}, got {reach.shape}.")
    return table, reach


def _cells(
    axes: Any,
    mesh: Any,
    table: Any,
    targets: Sequence[str],
    observed: Sequence[str],
    unsure: Any,
    strength: float,
    bound: float,
) -> None:
    """Numbers and outlines."""
    from matplotlib.patches import Rectangle

    digits, many = style.digits_for(bound), table.shape[1]
    worst = {leak[0]: leak[1] for leak in _leaks(table, targets, observed, strength)}
    for (row, column), cell in np.ndenumerate(table):
        if targets[row] == observed[column]:
            axes.add_patch(
                Rectangle((column, row), 1, 1, fill=False, edgecolor=style.INK, linewidth=1.6, clip_on=False)
            )
        if np.isnan(cell) or many > _MOST_NUMBERS:
            continue
        text = style.signed(cell, digits)
        if many > 12:  # every point of width counts
            text = text.replace("0.", ".", 1)
        under = style.luminance(mesh.cmap(mesh.norm(cell)))
        ink = style.SOFT if unsure[row, column] and under > 0.66 else style.INK
        colour = "white" if under < 0.18 else "black" if under < 0.5 else ink
        weight = "bold" if worst.get(row) == column else "normal"
        size = min(style.TEXT + 0.5, max(5.5, 108 / many)) if many > 10 else style.TEXT + 0.5
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", size=size, color=colour, weight=weight)


def _groups(
    axes: Any, targets: Sequence[str], observed: Sequence[str], system: ValueSystem | None, width: float
) -> None:
    """A bracket along the values of each group, under the columns and right of the rows."""
    if system is None or not system.groups:
        return
    for names, across in ((observed, True), (targets, False)):
        lanes: list[float] = []
        place = axes.get_xaxis_transform() if across else axes.get_yaxis_transform()
        for group, start, end in sorted(style.runs_of_groups(names, system.groups), key=lambda run: run[1]):
            # Groups that overlap by more than a border stand in lanes of their own.
            lane = next((lane for lane, last in enumerate(lanes) if last <= start), len(lanes))
            lanes[lane : lane + 1] = [end]
            step = (0.012 if across else 0.01) + 0.09 * lane
            ends, away = [start + 0.58, end + 0.42], [-step, -step] if across else [1 + step, 1 + step]
            line = (ends, away) if across else (away, ends)
            axes.plot(*line, transform=place, color=style.SOFT, linewidth=2, clip_on=False, solid_capstyle="butt")
            middle, text = (start + end + 1) / 2, style.label(group)
            if across:
                room = width / len(names) * (end - start) - 0.06
                if max(style.text_width(axes.figure, word, style.SMALL) for word in text.split()) > room:
                    continue  # the rows' brackets say the name
                text = "\n".join(style.wrapped(axes.figure, text, room, style.SMALL))
                axes.text(
                    middle,
                    -step - 0.012,
                    text,
                    transform=place,
                    ha="center",
                    va="top",
                    size=style.SMALL,
                    color=style.SOFT,
                )
            else:
                text = "\n".join(style.wrapped(axes.figure, text, 1.1, style.SMALL))
                axes.text(
                    1 + step + 0.01,
                    middle,
                    text,
                    transform=place,
                    ha="left",
                    va="center",
                    size=style.SMALL,
                    color=style.SOFT,
                )


def _leaks(
    table: Any, targets: Sequence[str], observed: Sequence[str], strength: float
) -> list[tuple[int, int, float]]:
    """Row, column and shift of the largest leak of each row that has one."""
    found = []
    for row, target in enumerate(targets):
        turned = np.copysign(1.0, strength) * table[row]
        turned[[column for column, name in enumerate(observed) if name == target]] = np.nan
        if np.isfinite(turned).any() and np.nanmax(turned) > 0:
            column = int(np.nanargmax(turned))
            found.append((row, column, float(table[row, column])))
    return found


def _alt(
    table: Any,
    targets: Sequence[str],
    observed: Sequence[str],
    system: ValueSystem | None,
    strength: float,
    quantity: str,
    unit: str,
) -> str:
    digits = style.digits_for(float(np.nanmax(np.abs(table))) if np.isfinite(table).any() else 0.0)
    said = [
        f"Heat map of the {quantity} in {unit}: {len(targets)} values dialled to {style.strength_text(strength)}, "
        f"one per row, by {len(observed)} values observed."
    ]
    own = {
        target: float(table[row, observed.index(target)])
        for row, target in enumerate(targets)
        if target in observed and np.isfinite(table[row, observed.index(target)])
    }
    if own:
        low, high = min(own, key=lambda name: own[name]), max(own, key=lambda name: own[name])
        said.append(
            f"The dialled values themselves move by {style.signed(float(np.mean(list(own.values()))), digits)} on average, "
            f"from {style.signed(own[low], digits)} ({style.label(low, system)}) to {style.signed(own[high], digits)} "
            f"({style.label(high, system)})."
        )
    leaks = _leaks(table, targets, observed, strength)
    if leaks:
        row, column, shift = max(leaks, key=lambda leak: abs(leak[2]))
        said.append(
            f"The largest leak: dialling {style.label(targets[row], system)} moves "
            f"{style.label(observed[column], system)} by {style.signed(shift, digits)}."
        )
    elif np.isfinite(table).any():
        said.append("No other value moves the way that a target was dialled.")
    missing = int(np.isnan(table).sum())
    if missing:
        said.append(f"Empty, since nothing was measured there: {missing} of {table.size} cells.")
    return " ".join(said)
