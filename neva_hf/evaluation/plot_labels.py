"""Labels beside points, so that nobody has to hunt through a legend: where they fit without covering anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from neva_hf.evaluation import plot_style as style

_WAYS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
_DISTANCES = (7.0, 13.0, 21.0, 32.0, 46.0, 62.0)  # points; from the third on, a line leads to the point


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def shared(self, other: Box) -> float:
        """The area that two rectangles have in common."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.top, other.top) - max(self.bottom, other.bottom)
        return wide * high if wide > 0 and high > 0 else 0.0


def label_points(
    axes: Any,
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    bars: Sequence[tuple[tuple[float, float], tuple[float, float]]] = (),
    *,
    size: float = style.SMALL,
    bold: Sequence[bool] = (),
    colours: Sequence[str] = (),
) -> None:
    """Writes a text beside each point, inside the axes and away from the points, the bars and the other texts.

    Every text takes the best of 48 places around its point, one after the other, those in the thick of the others first.
    The axes must have their final limits and place.

    Args:
        axes (`matplotlib.axes.Axes`): Where the points are.
        points (`Sequence[tuple[float, float]]`): In data coordinates.
        texts (`Sequence[str]`): One per point.
        bars (`Sequence`): Lines that must stay visible, as pairs of ends in data coordinates.
        size (`float`): In points.
        bold (`Sequence[bool]`): Which of them are bold.
        colours (`Sequence[str]`): One per text.
    """
    figure = axes.figure
    per_point = figure.dpi / 72
    inside = _box(axes.get_window_extent(), 0)
    pixels = [tuple(axes.transData.transform(point)) for point in points]
    taken = [_around(x, y, 4 * per_point, 4 * per_point) for x, y in pixels]
    for start, end in bars:
        (x0, y0), (x1, y1) = axes.transData.transform(start), axes.transData.transform(end)
        taken.append(Box(min(x0, x1) - 5, min(y0, y1) - 2, max(x0, x1) + 5, max(y0, y1) + 2))

    def crowding(place: int) -> float:
        x, y = pixels[place]
        return sum(1 / (1 + abs(x - a) + abs(y - b)) for a, b in pixels)

    for place in sorted(range(len(points)), key=crowding, reverse=True):
        weight = "bold" if place < len(bold) and bold[place] else "normal"
        lines = style.wrapped(figure, texts[place], 1.5, size, weight)
        wide = max(style.text_width(figure, line, size, weight) for line in lines) * figure.dpi
        high = 1.25 * size * per_point * len(lines)
        best: tuple[float, float, float, float, Box] | None = None
        for distance in _DISTANCES:
            for way, (right, up) in enumerate(_WAYS):
                reach = distance * per_point * (0.75 if right and up else 1.0)
                x = pixels[place][0] + right * (reach + wide / 2)
                y = pixels[place][1] + up * (reach + (high / 2 if not right else 0.0))
                box = _around(x, y, wide / 2, high / 2)
                outside = wide * high - box.shared(inside)
                covered = sum(box.shared(other) for other in taken)
                cost = 50 * outside + 6 * covered + 4 * distance * per_point + way
                if best is None or cost < best[0]:
                    best = (cost, distance, x, y, box)
        assert best is not None
        _, distance, x, y, box = best
        taken.append(box)
        colour = colours[place] if place < len(colours) else style.INK
        line = {"arrowstyle": "-", "color": style.SOFT, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4}
        written = axes.annotate(
            "\n".join(lines),
            points[place],
            # (from the point, in points: pixels change with the resolution that the picture is saved at)
            xytext=((x - pixels[place][0]) / per_point, (y - pixels[place][1]) / per_point),
            textcoords="offset points",
            ha="center",
            va="center",
            size=size,
            weight=weight,
            color=colour,
            zorder=6,
            arrowprops=line if distance > _DISTANCES[1] else None,
            annotation_clip=False,
        )
        written.set_in_layout(False)


def _around(x: float, y: float, half_wide: float, half_high: float) -> Box:
    return Box(x - half_wide, y - half_high, x + half_wide, y + half_high)


def _box(extent: Any, margin: float) -> Box:
    return Box(extent.x0 - margin, extent.y0 - margin, extent.x1 + margin, extent.y1 + margin)
