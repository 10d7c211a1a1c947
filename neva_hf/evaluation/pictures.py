"""From a report to its pictures: which numbers go where. How they are drawn is in plots.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from neva_hf.values import ValueSystem


def draw(
    report: Mapping[str, Any],
    folder: Path,
    *,
    system: ValueSystem | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, str]:
    """Draws what a report has numbers for.

    Args:
        report (`Mapping[str, Any]`): From [`evaluate`].
        folder (`Path`): Where the files go.
        system ([`ValueSystem`], *optional*): Labels, groups and circle.
        tell (`Callable[[str], None]`): Is told when there is no matplotlib.

    Returns:
        `dict[str, str]`: File name -> alt text; empty without matplotlib.
    """
    if find_spec("matplotlib") is None:
        tell('No pictures: they need matplotlib. Install it with pip install "neva-hf[plots]", and run this again.')
        return {}
    from . import plots

    name, targets, observed = next(iter(report["methods"])), report["values"], report["observed"]
    below = f"{name} on {report['model']['name'] or 'the base model'}, {report['scenarios']['count']} questions"
    found: dict[str, str] = {}
    for side, numbers in report["methods"][name]["strengths"].items():
        strength = float(side)
        sign = math.copysign(1.0, strength)
        shifts = _turned(numbers["shifts"], sign)
        file = f"leakage_matrix_{_word(strength)}.png"
        ends = [[sorted(_turned([pair], sign)[0]) for pair in row] for row in numbers["shifts_95"]]
        found[file] = plots.leakage_matrix(
            folder / file, shifts, targets, observed, subtitle=below, intervals=ends, system=system, strength=strength
        )
        if system is not None and system.has_circle and all(value in system for value in observed):
            file = f"value_circle_{_word(strength)}.png"
            angles = [system[value].angle for value in observed]
            found[file] = plots.value_circle(
                folder / file, observed, angles, shifts, targets, subtitle=below, system=system, strength=strength
            )
    if report["dose"]:
        found["dose_curves.png"] = plots.dose_curves(folder / "dose_curves.png", report["dose"], system=system)
    if len(report["methods"]) > 1:
        points = [
            plots.MethodPoint(method, float(side), _measures(numbers))
            for method, told in report["methods"].items()
            for side, numbers in told["strengths"].items()
        ]
        for file, drawn in (("methods.png", plots.control_against_damage), ("bars.png", plots.method_bars)):
            found[file] = drawn(folder / file, points, subtitle=below, highlight=name)
    return found


def _measures(numbers: Mapping[str, Any]) -> dict[str, list[float]]:
    """The numbers of a method at a strength, by the names that plots know; an end that does not exist is the estimate."""
    named = {
        "target": numbers["target"],
        "csr": numbers["csr_change"],
        "nlr": numbers["nlr"],
        "own_over_other": numbers["own_over_other"],
        "kl": numbers["damage"]["kl"],
        "perplexity_ratio": numbers["damage"]["perplexity_ratio"],
    }
    return {
        measure: [found[0] if end is None else end for end in found]
        for measure, found in named.items()
        if found[0] is not None
    }


def _turned(rows: Sequence[Sequence[float | None]], sign: float) -> list[list[float]]:
    """As measured: reports turn negative strengths round, pictures do not."""
    return [[math.nan if cell is None else sign * cell for cell in row] for row in rows]


def _word(strength: float) -> str:
    return f"{'plus' if strength > 0 else 'minus'}_{abs(strength):g}"
