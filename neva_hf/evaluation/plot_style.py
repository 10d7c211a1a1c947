"""What all pictures share: one width, one look, and colours that every kind of eye tells apart.

A picture is 8 inches wide and saved at 200 dots per inch. Shown 800 pixels wide, a point is then 1.4 pixels, so the
smallest type, 7.5 points, is a little over 10 pixels high.

Colours: orange for what rises and purple for what falls (out of ColorBrewer's PuOr, which is light in the middle and dark
at both ends), blue for the method that a picture is about, grey for everything else. No meaning hangs on colour alone:
signs are also written, or outward against inward. `tests/test_plots.py` simulates protanopia, deuteranopia and tritanopia
(Machado, Oliveira & Fernandes 2009, "A Physiologically-based Model for Simulation of Color Vision Deficiency", at
severity 1.0) and asks for a CIE76 difference of at least 25 between any two colours that stand for different things.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from neva_hf.errors import NeVAError
from neva_hf.values import ValueSystem

WIDTH, DPI = 8.0, 200
INK, SOFT, FAINT = "#222222", "#5c5c5c", "#d9d9d9"
RISE, FALL, FOCUS, OTHERS = "#b35806", "#542788", "#0072b2", "#8a8a8a"
FLUENT = "#e6eff6"
DIVERGING = "PuOr_r"
SMALL, TEXT, LARGE = 7.5, 8.5, 12.0  # points

_STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that a picture is the same everywhere
    "font.size": TEXT,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a label is a dollar sign
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.labelsize": TEXT,
    "axes.titlesize": TEXT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
}
_LOCK = threading.Lock()


@contextmanager
def drawing(*, constrained: bool = True) -> Iterator[Any]:
    """A figure to draw on, with matplotlib's settings put back afterwards.

    Pyplot is not used, so neither its current figure nor the backend of a notebook changes. The settings are
    matplotlib's own and ours while the block runs, whatever the caller has set, so that a picture is the same everywhere.
    They belong to the whole process, so one picture is drawn at a time.

    Args:
        constrained (`bool`): Whether matplotlib arranges the axes; else they are placed by hand.

    Returns:
        `matplotlib.figure.Figure`: 8 inches wide, with an Agg canvas.

    Raises:
        `NeVAError`: If matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NeVAError("Pictures need matplotlib: `pip install neva-hf[plots]`.") from error
    with _LOCK, matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(WIDTH, WIDTH), dpi=100, layout="constrained" if constrained else None)
        FigureCanvasAgg(figure)
        yield figure


def save(figure: Any, path: str | os.PathLike[str], alt: str) -> str:
    """Writes the picture with its alt text inside, and nothing in it that differs from run to run.

    Args:
        figure (`matplotlib.figure.Figure`): From [`drawing`].
        path (`str` or `os.PathLike`): A file that ends in `.png`; its folder is made.
        alt (`str`): What the picture shows.

    Returns:
        `str`: `alt`.

    Raises:
        `NeVAError`: If the path does not end in `.png`.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise NeVAError(f"A picture is written as PNG, so its path must end in .png, got {str(path)!r}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"Software": "neva-hf", "Description": alt.replace("−", "-")}
    figure.savefig(path, dpi=DPI, facecolor="white", metadata=about)
    return alt


def head(figure: Any, body: float, title: str, subtitle: str = "") -> float:
    """Writes title and subtitle over a body of a given height, wrapped to the width, and sizes the figure to hold them.

    Args:
        figure (`matplotlib.figure.Figure`): From [`drawing`].
        body (`float`): The height of everything else, in inches.
        title (`str`): The first, bold line.
        subtitle (`str`): The lines below it, in grey.

    Returns:
        `float`: The height of the head, in inches.
    """
    lines = [(line, LARGE, "bold", INK) for line in wrapped(figure, title, WIDTH - 0.3, LARGE, "bold")]
    lines += [(line, TEXT, "normal", SOFT) for line in wrapped(figure, subtitle, WIDTH - 0.3, TEXT)]
    heights = [1.45 * size / 72 for _, size, _, _ in lines]
    used = 0.1 + sum(heights) + 0.1 if lines else 0.05
    figure.set_size_inches(WIDTH, body + used)
    top = body + used - 0.1
    for (line, size, weight, colour), height in zip(lines, heights, strict=True):
        figure.text(0.15 / WIDTH, top / (body + used), line, size=size, weight=weight, color=colour, va="top")
        top -= height
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.set(rect=(0, 0, 1, body / (body + used)), w_pad=0.06, h_pad=0.06)
    return used


def text_width(figure: Any, text: str, size: float, weight: str = "normal") -> float:
    """How wide a line of text is, in inches."""
    from matplotlib.font_manager import FontProperties

    font = FontProperties(size=size, weight=weight)
    wide = figure.canvas.get_renderer().get_text_width_height_descent(text, font, ismath=False)[0]
    return float(wide) / figure.dpi


def wrapped(figure: Any, text: str, inches: float, size: float, weight: str = "normal") -> list[str]:
    """Breaks a text into lines that are no wider than some inches, between words and, if need be, inside them."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(figure, joined, size, weight) <= inches:
            lines[-1] = joined
            continue
        while len(word) > 1 and text_width(figure, word, size, weight) > inches:
            fits = len(word) - 1
            while fits > 1 and text_width(figure, word[:fits], size, weight) > inches:
                fits -= 1
            lines.append(word[:fits])
            word = word[fits:]
        lines.append(word)
    return lines


def label(name: str, system: ValueSystem | None = None) -> str:
    """What people read for a name: the system's label, or the name with spaces and a capital letter.

    Example:

    ```py
    >>> label("self_enhancement"), label("openness_to_change")
    ('Self-enhancement', 'Openness to change')
    ```
    """
    if system is not None and name in system:
        return system[name].label
    plain = name.replace("self_", "self-").replace("_", " ").strip()
    return plain[:1].upper() + plain[1:]


def in_circle_order(names: Sequence[str], system: ValueSystem | None) -> list[int]:
    """The places of names in the order of the circle; those that the system does not know, or all without one, as given.

    Example:

    ```py
    >>> from neva_hf.values import load_value_system
    >>> in_circle_order(["power", "mirth", "hedonism"], load_value_system())
    [2, 0, 1]
    ```
    """
    places = list(range(len(names)))
    if system is None or not system.has_circle:
        return places
    angles = {value.name: value.angle for value in system if value.angle is not None}
    return sorted(places, key=lambda place: angles.get(names[place], math.inf))


def runs_of_groups(names: Sequence[str], groups: Mapping[str, Sequence[str]]) -> list[tuple[str, float, float]]:
    """Where groups stand in a row of values, as stretches of neighbours.

    A value at the end of two stretches is on their border, so that both end in its middle.

    Args:
        names (`Sequence[str]`): Values in the order in which they are drawn.
        groups (`Mapping[str, Sequence[str]]`): Group -> its values.

    Returns:
        `list[tuple[str, float, float]]`: Group, first and last edge, where the value at place `i` reaches from
        `i - 0.5` to `i + 0.5`.

    Example:

    ```py
    >>> runs_of_groups(["a", "b", "c"], {"first": ["a", "b"], "second": ["b", "c"]})
    [('first', -0.5, 1.0), ('second', 1.0, 2.5)]
    ```
    """
    found: list[tuple[str, int, int]] = []
    for group, members in groups.items():
        places = [place for place, name in enumerate(names) if name in members]
        for place in places:
            if found and found[-1][0] == group and found[-1][2] == place - 1:
                found[-1] = (group, found[-1][1], place)
            else:
                found.append((group, place, place))
    starts = {start for _, start, end in found if end > start}
    ends = {end for _, start, end in found if end > start}
    return [
        (
            group,
            float(start) if start in ends and end > start else start - 0.5,
            float(end) if end in starts and end > start else end + 0.5,
        )
        for group, start, end in found
    ]


def signed(number: float, digits: int = 2) -> str:
    """A number with its sign, and without one where it rounds to nothing.

    Example:

    ```py
    >>> signed(0.384), signed(-0.05), signed(-0.001)
    ('+0.38', '−0.05', '0.00')
    ```
    """
    text = f"{number:+.{digits}f}".replace("-", "−")
    return text if any(digit in text for digit in "123456789") else text[1:]


def strength_text(strength: float) -> str:
    """A strength as people write it: `+1`, `−0.5`."""
    return f"{strength:+g}".replace("-", "−")


def digits_for(bound: float) -> int:
    """How many decimals tell numbers up to a bound apart: 2 for those between 0.1 and 10."""
    if not bound > 0 or not math.isfinite(bound):
        return 2
    return min(6, max(0, 1 - math.floor(math.log10(bound)) + (1 <= bound < 10)))


def luminance(colour: Any) -> float:
    """The relative luminance of a colour, 0 (black) to 1 (white), as WCAG 2.2 defines it.

    White type has the contrast of 4.5 that it asks for on luminances up to 0.183, black type on those from 0.175.
    """
    from matplotlib.colors import to_rgb

    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
    return float(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
