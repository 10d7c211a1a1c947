"""The parts of a circle of values: its face, bars, names, and the ring of groups around it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from neva_hf.evaluation import plot_style as style
from neva_hf.values import ValueSystem

_HUB = 0.16  # the radius below which no bar reaches, so that bars do not meet


@dataclass(frozen=True)
class Scale:
    """From shifts to radii. The rim is 1.

    Args:
        ring (`float`): The radius where nothing moves.
        per_unit (`float`): Radius per unit of shift.
        step (`float`): The shift from one thin ring to the next.
    """

    ring: float
    per_unit: float
    step: float

    def radius(self, shift: float) -> float:
        """Where a bar of some shift ends."""
        return self.ring + self.per_unit * shift


def fitting_scale(table: Any) -> Scale:
    """The scale on which all shifts, at once, lie between hub and rim.

    Args:
        table (`numpy.ndarray`): Shifts of any shape; NaN counts for nothing.

    Returns:
        [`Scale`]: It leaves room on both sides of the ring, so that the ring neither fills the rim nor shrinks to the hub.
    """
    finite = table[np.isfinite(table)]
    high, low = float(finite.max(initial=0.0)), -float(finite.min(initial=0.0))
    high, low = (high, low) if high + low else (1.0, 1.0)
    high, low = max(high, 0.35 * low), max(low, 0.45 * high)
    per_unit = (1 - _HUB) / (high + low)
    rough = max(high, low) / 2
    power = 10.0 ** np.floor(np.log10(rough))
    step = max(nice for nice in (power, 2 * power, 5 * power) if nice <= rough * 1.001)
    return Scale(ring=_HUB + per_unit * low, per_unit=per_unit, step=float(step))


@dataclass
class Circle:
    """A circle of values, drawn in parts on axes whose unit is the radius.

    Args:
        figure (`matplotlib.figure.Figure`): From [`plot_style.drawing`].
        values (`list[str]`): The values.
        angles (`list[float]`): Their places in degrees, from the top against the clock.
        scale ([`Scale`]): From shifts to radii.
        system (`ValueSystem`, *optional*): Labels and groups.
    """

    figure: Any
    values: list[str]
    angles: list[float]
    scale: Scale
    system: ValueSystem | None = None
    radius: float = field(default=1.0, init=False)
    box: tuple[float, float] = field(default=(1.0, 1.0), init=False)
    axes: Any = field(default=None, init=False)

    def open(self, box: tuple[float, float, float, float], radius: float) -> None:
        """Goes to a new place: a box (left, bottom, width, height) and a radius, in inches."""
        left, bottom, wide, high = box
        whole = self.figure.get_size_inches()[1]
        self.axes = self.figure.add_axes((left / style.WIDTH, bottom / whole, wide / style.WIDTH, high / whole))
        self.axes.set_xlim(-wide / 2 / radius, wide / 2 / radius)
        self.axes.set_ylim(-high / 2 / radius, high / 2 / radius)
        self.axes.set_axis_off()
        self.radius, self.box = radius, (wide, high)

    def text(self, x: float, y: float, text: str, **look: Any) -> None:
        """Writes at a point in radii."""
        self.axes.text(x, y, text, **look)

    def face(self) -> None:
        """The rim, the ring, the thin rings and a spoke per value."""
        from matplotlib import patches

        def ring(radius: float, **look: Any) -> None:
            self.axes.add_patch(patches.Circle((0, 0), radius, **look))

        ring(1, facecolor="#fafafa", edgecolor=style.FAINT, linewidth=0.8)
        for angle in self.angles:
            inner, outer = _at(angle, _HUB * 0.5), _at(angle, 1)
            self.axes.plot([inner[0], outer[0]], [inner[1], outer[1]], color=style.FAINT, linewidth=0.6, zorder=1)
        for count in range(-20, 21):
            radius = self.scale.radius(count * self.scale.step)
            if count and _HUB * 0.5 < radius <= 1.0001:
                ring(radius, fill=False, edgecolor="#c4c4c4", linewidth=0.6, linestyle=(0, (3, 3)), zorder=2)
        ring(self.scale.ring, fill=False, edgecolor=style.SOFT, linewidth=1.2, zorder=4)

    def bars(self, shifts: Any, target: str) -> None:
        """A bar per value, of one width at every radius; the target's has a black edge."""
        from matplotlib.patches import Polygon

        width = min(0.16, 1.5 / len(self.values))
        for value, angle, shift in zip(self.values, self.angles, shifts, strict=True):
            if np.isnan(shift):
                continue
            inner, outer = _at(angle, self.scale.ring), _at(angle, self.scale.radius(shift))
            aside = _at(angle + 90, width / 2)
            own = value == target
            self.axes.add_patch(
                Polygon(
                    [inner + aside, outer + aside, outer - aside, inner - aside],
                    facecolor=style.RISE if shift > 0 else style.FALL,
                    edgecolor="black" if own else "none",
                    linewidth=1.3 if own else 0,
                    zorder=5 if own else 3,
                )
            )

    def names(self, size: float, start: float, shifts: Any = None, bold: Collection[str | None] = ()) -> None:
        """The names around the circle from some radius on, with their shifts below, if given.

        More than 12 small names stand along their spokes, where they cannot meet.
        """
        digits = 2 if shifts is None else style.digits_for(float(np.nanmax(np.abs(shifts), initial=0.0)))
        along = len(self.values) > 12 and self.radius < 1.5
        for place, (value, angle) in enumerate(zip(self.values, self.angles, strict=True)):
            (x, y), name = _at(angle, start), style.label(value, self.system)
            weight = "bold" if value in bold else "normal"
            number = [] if shifts is None or np.isnan(shifts[place]) else [style.signed(shifts[place], digits)]
            if along:
                wide, high = self.box
                away = min(
                    half / max(abs(way), 1e-9) for half, way in zip((wide / 2, high / 2), _at(angle, 1.0), strict=True)
                )
                name = "\n".join(style.wrapped(self.figure, name, away - start * self.radius - 0.12, size, weight))
                turn = 90 + angle % 360
                flipped = 90 < turn % 360 < 270
                look = {"rotation": turn - 180 if flipped else turn, "rotation_mode": "anchor", "va": "center"}
                self.text(x, y, name, size=size, ha="right" if flipped else "left", weight=weight, **look)
                continue
            middle = abs(x) < 0.1 * start
            room = self.box[0] / 2 - abs(x) * self.radius - 0.08 if not middle else 1.6
            if len(self.values) > 12:  # one line, where there is room, keeps neighbours apart at top and bottom
                lines = style.wrapped(self.figure, " ".join([name, *number]), room, size, weight)
            else:
                lines = [*style.wrapped(self.figure, name, room, size, weight), *number]
            va = "center" if abs(y) < 0.6 * start else "bottom" if y > 0 else "top"
            ha = "center" if middle else "left" if x > 0 else "right"
            self.text(x, y, "\n".join(lines), size=size, weight=weight, ha=ha, va=va, linespacing=1.15)

    def group_ring(self, size: float) -> float:
        """Arcs with the names of the groups, written along them. Returns the radius from which names may start."""
        from matplotlib.patches import Arc

        start = 1 + 0.08 / self.radius
        if self.system is None or not self.system.groups:
            return start
        written = start + 0.06 / self.radius
        for group, first, last in self._arcs():
            self.axes.add_patch(
                Arc(
                    (0, 0),
                    2 * start,
                    2 * start,
                    theta1=first + 91.5,
                    theta2=last + 88.5,
                    color=style.SOFT,
                    linewidth=1.8,
                )
            )
            self._along(style.label(group), (first + last) / 2, np.deg2rad(last - first - 3), written, size)
        return written + (size / 72 + 0.12) / self.radius

    def _arcs(self) -> list[tuple[str, float, float]]:
        """Group, first and last angle, each group as few arcs as it has stretches of neighbours."""
        assert self.system is not None
        order = sorted(range(len(self.values)), key=lambda place: self.angles[place] % 360)
        count, groups = len(order), self.system.groups
        for _ in order:  # a row of values that begins between two groups
            first, last = self.values[order[0]], self.values[order[-1]]
            if not any(first in members and last in members for members in groups.values()):
                break
            order = order[1:] + order[:1]
        angles = [self.angles[place] % 360 for place in order]
        turns = [angles[0]]
        for before, after in pairwise(angles):
            turns.append(turns[-1] + (after - before) % 360)
        turns = [turns[-1] - 360, *turns, turns[0] + 360]  # neighbours on both sides of the cut
        runs = style.runs_of_groups([self.values[place] for place in order], groups)
        edge = np.interp
        return [
            (group, float(edge(start, range(-1, count + 1), turns)), float(edge(end, range(-1, count + 1), turns)))
            for group, start, end in runs
        ]

    def _along(self, text: str, middle: float, room: float, radius: float, size: float) -> None:
        """Writes along an arc that is `room` radians long, upright on both halves, if it fits."""
        from matplotlib.font_manager import FontProperties
        from matplotlib.patches import PathPatch
        from matplotlib.path import Path
        from matplotlib.textpath import TextPath

        written = TextPath((0, 0), text, size=size, prop=FontProperties(family="DejaVu Sans"))
        points = np.asarray(written.vertices) / 72 / self.radius
        width = float(points[:, 0].max())
        if width / radius > room:
            points *= (shrunk := room * radius / width)
            size, width = size * shrunk, width * shrunk
            if shrunk < 0.9:
                return
        below = np.cos(np.deg2rad(middle)) < -0.05
        turn = (points[:, 0] - width / 2) / radius
        out = radius + (size * 0.75 / 72 / self.radius - points[:, 1] if below else points[:, 1])
        angle = np.deg2rad(middle) + (turn if below else -turn)
        bent = np.stack([-out * np.sin(angle), out * np.cos(angle)], axis=1)
        self.axes.add_patch(PathPatch(Path(bent, written.codes), facecolor=style.SOFT, linewidth=0))


def _at(angle: float, radius: float) -> Any:
    """A point of the circle: degrees from the top, against the clock."""
    turn = np.deg2rad(angle)
    return np.array([-radius * np.sin(turn), radius * np.cos(turn)])
