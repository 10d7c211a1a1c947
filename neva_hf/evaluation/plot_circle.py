"""Schwartz's circle: how far each value moves, outward for a rise and inward for a fall."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from neva_hf.errors import NeVAError
from neva_hf.evaluation import plot_style as style
from neva_hf.evaluation.plot_circle_parts import Circle, fitting_scale
from neva_hf.values import ValueSystem

_COLUMNS = 4


def value_circle(
    path: str | os.PathLike[str],
    values: Sequence[str],
    angles: Sequence[float | None],
    rises: ArrayLike,
    target: str | Sequence[str],
    *,
    title: str = "",
    subtitle: str = "",
    system: ValueSystem | None = None,
    strength: float = 1.0,
    quantity: str = "shift of the margin",
    unit: str = "nats per token",
) -> str:
    """Draws how far every value moves when one is dialled, each in its place on the circle.

    The ring is where nothing moves. Bars have the same width everywhere and their length is the shift, so that nothing
    looks larger for being farther out. One target is drawn large with all names and numbers; several are drawn small, on
    one scale, after a key.

    Args:
        path (`str` or `os.PathLike`): The PNG file to write.
        values (`Sequence[str]`): The observed values.
        angles (`Sequence[float]`): Their places on the circle in degrees, from the top against the clock.
        rises (array-like): `[values]`, or `[targets, values]` for several targets: what was measured at `strength` minus
            at 0. NaN draws nothing.
        target (`str` or `Sequence[str]`): The dialled value, or several.
        title (`str`): What stands over the picture; made from the target if empty.
        subtitle (`str`): The line below it, for the model, the number of scenarios and the like.
        system (`ValueSystem`, *optional*): Gives labels and groups.
        strength (`float`): The strength of the dials, of which the sign says which way is a leak.
        quantity (`str`): What the numbers are.
        unit (`str`): Their unit.

    Returns:
        `str`: Alt text.

    Raises:
        `NeVAError`: If the shapes do not fit, or a value has no angle (draw the matrix instead).

    Example:

    ```py
    >>> import tempfile
    >>> from neva_hf.evaluation.plots import value_circle
    >>> file = tempfile.mkdtemp() + "/circle.png"
    >>> alt = value_circle(file, ["north", "west", "south"], [0, 90, 180], [0.4, 0.1, -0.2], "north")
    >>> "Most leak: West +0.10." in alt
    True
    ```
    """
    several = not isinstance(target, str)
    targets = [target] if isinstance(target, str) else list(target)
    table = _checked(values, angles, rises, targets, several)
    leaks = [_leak(values, row, name, strength) for row, name in zip(table, targets, strict=True)]
    scale = fitting_scale(table)
    way = style.strength_text(strength)
    notes = "Out from the ring: rises. In: falls. Black edge: the dialled value. "
    notes += f"Dashed rings: every {scale.step:g} {unit}."
    told = f"{subtitle.rstrip('.')}. {notes}" if subtitle else notes
    with style.drawing(constrained=False) as figure:
        circle = Circle(figure, list(values), [float(angle or 0.0) for angle in angles], scale, system)
        if several:
            title = title or f"What each dial at {way} moves"
            _small_multiples(circle, table, targets, leaks, title, told)
        else:
            title = title or f"What {style.label(targets[0], system)} at {way} moves"
            body = 6.15 if system is not None and system.groups else 5.6
            style.head(figure, body, title, told)
            circle.open((0, 0, style.WIDTH, body), radius=2.25)
            circle.face()
            circle.bars(table[0], targets[0])
            circle.names(style.TEXT, circle.group_ring(style.TEXT), table[0], {targets[0], leaks[0]})
        return style.save(figure, path, _alt(values, table, targets, leaks, system, way, quantity, unit))


def _small_multiples(
    circle: Circle, table: Any, targets: Sequence[str], leaks: Sequence[str | None], title: str, subtitle: str
) -> None:
    """A key two columns wide, and a circle per target under its name and over its largest leak."""
    figure, system = circle.figure, circle.system
    wide = style.WIDTH / _COLUMNS
    digits = style.digits_for(float(np.nanmax(np.abs(table))) if np.isfinite(table).any() else 0.0)
    tops, feet = [], []
    for row, target, leak in zip(table, targets, leaks, strict=True):
        own = row[circle.values.index(target)] if target in circle.values else math.nan
        number = "" if np.isnan(own) else f" {style.signed(own, digits)}"
        tops.append(style.wrapped(figure, style.label(target, system) + number, wide - 0.15, style.TEXT + 0.5, "bold"))
        foot = "no other moves along"
        if leak is not None:
            number = style.signed(row[circle.values.index(leak)], digits)
            foot = f"most leak: {style.label(leak, system)} {number}"
        feet.append(style.wrapped(figure, foot, wide - 0.25, style.SMALL))
    over, under = 0.18 * max(map(len, tops)) + 0.06, 0.15 * max(map(len, feet)) + 0.16
    radius = 0.8
    high = over + 2 * radius + 0.1 + under
    rows_of_key = 1 if len(circle.values) <= 12 else 2
    places = [(row, column) for row in range(len(targets) + 2) for column in range(_COLUMNS)]
    places = [place for place in places if place[0] >= rows_of_key or place[1] >= 2][: len(targets)]
    rows = max(rows_of_key, *(row + 1 for row, _ in places))
    style.head(figure, rows * high, title, subtitle)

    key = rows_of_key * high
    circle.open((0, rows * high - key, 2 * wide, key), radius=0.68 if rows_of_key == 1 else 0.8)
    circle.face()
    circle.names(style.SMALL, circle.group_ring(style.SMALL))
    for (row, column), shifts, target, above, below in zip(places, table, targets, tops, feet, strict=True):
        bottom = (rows - row - 1) * high
        circle.open((column * wide, bottom + under, wide, 2 * radius + 0.1), radius)
        circle.face()
        circle.bars(shifts, target)
        circle.text(0, 1.05 + 0.03, "\n".join(above), size=style.TEXT + 0.5, weight="bold", ha="center", va="bottom")
        circle.text(0, -1.05 - 0.03, "\n".join(below), size=style.SMALL, color=style.SOFT, ha="center", va="top")


def _leak(values: Sequence[str], row: Any, target: str, strength: float) -> str | None:
    """The other value that went farthest the way the target was dialled, if one did."""
    turned = {
        value: math.copysign(1.0, strength) * float(shift)
        for value, shift in zip(values, row, strict=True)
        if value != target and np.isfinite(shift)
    }
    most = max(turned, key=lambda value: turned[value], default=None)
    return most if most is not None and turned[most] > 0 else None


def _checked(values: Any, angles: Any, rises: Any, targets: Any, several: bool) -> Any:
    table = np.array(rises, dtype=float)
    shape = (len(targets), len(values)) if several else (len(values),)
    if table.shape != shape or 0 in shape or len(angles) != len(values):
        raise NeVAError(
            f"`rises` must be {shape}, got {table.shape}, with one angle for each of the {len(values)} values, "
            f"got {len(angles)}."
        )
    if any(angle is None or not np.isfinite(angle) for angle in angles):
        raise NeVAError(
            "A value without an angle has no place on a circle; draw `leakage_matrix` for this value system."
        )
    table[~np.isfinite(table)] = np.nan
    return table.reshape(len(targets), len(values))


def _alt(
    values: Sequence[str],
    table: Any,
    targets: Sequence[str],
    leaks: Sequence[str | None],
    system: ValueSystem | None,
    way: str,
    quantity: str,
    unit: str,
) -> str:
    digits = style.digits_for(float(np.nanmax(np.abs(table))) if np.isfinite(table).any() else 0.0)

    def moved(row: int, value: str) -> str:
        return f"{style.label(value, system)} {style.signed(table[row, values.index(value)], digits)}"

    own = {row: abs(table[row, values.index(name)]) for row, name in enumerate(targets) if name in values}
    own = {row: size for row, size in own.items() if np.isfinite(size)}
    shown = f"the {quantity} of {len(values)} values in {unit}"
    if len(targets) == 1:
        said = [f"Circle of values with {style.label(targets[0], system)} dialled to {way}: {shown}."]
        said += [f"The dialled value: {moved(row, targets[row])}." for row in own]
        said += [f"Most leak: {moved(0, leak)}." for leak in leaks if leak is not None]
    else:
        said = [f"{len(targets)} circles of values, each with one value dialled to {way}: {shown}."]
        if own:
            least, most = min(own, key=lambda row: own[row]), max(own, key=lambda row: own[row])
            said.append(
                f"The dialled values move from {moved(least, targets[least])} to {moved(most, targets[most])}."
            )
        sizes = {row: abs(table[row, values.index(leak)]) for row, leak in enumerate(leaks) if leak is not None}
        if sizes:
            row = max(sizes, key=lambda row: sizes[row])
            said.append(
                f"Most leak: {moved(row, str(leaks[row]))} when {style.label(targets[row], system)} is dialled."
            )
    if not any(leaks):
        said.append("No other value moves the way that it was dialled.")
    return " ".join(said)
