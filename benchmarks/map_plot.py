"""The picture of `map_quality.py`: how far each dial moves its value beside CAA, and who moves along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

OURS, THEIRS = "#0072B2", "#E69F00"  # blue and orange of Okabe and Ito, told apart by all kinds of eyes


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws a result at strength +1, or at the sign that was measured.

    Args:
        result (`dict`): From [`map_report.report`].
        path (`Path`): The picture to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    side = "+1" if "+1" in result["map_over_caa"] else next(iter(result["map_over_caa"]))
    ours, theirs = (result["methods"][name][side] for name in ("map", "caa"))
    order = result["circle"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.4), width_ratios=[1, 1.15], layout="constrained")
    bars(left, order, ours, theirs, f"CAA, layer {result['caa']['layer']}", side)
    image = heat(right, order, result, ours, side)
    figure.colorbar(image, ax=right, label="shift of the margin, nats per token", shrink=0.85)
    figure.suptitle(
        f"{str(result['base_model']).split('/')[-1]}, {result['neurons'] or '?'} neurons per value, "
        f"{result['scenarios']['count']} unseen questions, both methods at a KL divergence of "
        f"{result['target_kl']:g} nats per token",
        fontsize=10,
        color="0.35",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def bars(axes: Any, order: list[str], ours: Any, theirs: Any, caa: str, side: str) -> None:
    """Target shift per value with its interval, map and CAA beside each other."""
    places = np.arange(len(order))
    for found, name, colour, hatch, by in ((ours, "neuron map", OURS, "", -0.2), (theirs, caa, THEIRS, "//", 0.2)):
        each = np.array([found["values"][value]["target"] for value in order])
        reach = np.abs(each[:, 1:] - each[:, :1]).T
        label = f"{name}: mean {found['target'][0]:+.2f}, leakage (NLR) {found['nlr'][0]:.2f}"
        axes.barh(places + by, each[:, 0], 0.38, xerr=reach, color=colour, hatch=hatch, edgecolor="white", label=label)
    axes.set_yticks(places, [value.replace("_", "-") for value in order], fontsize=9)
    axes.invert_yaxis()
    axes.axvline(0, color="0.4", linewidth=0.8)
    axes.set_xlabel("shift of the value's own margin, nats per token (lines: 95% intervals)")
    axes.set_title(f"How far a dial at {side.replace('-', '−')} moves its value")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=9, frameon=False)


def heat(axes: Any, order: list[str], result: dict[str, Any], ours: Any, side: str) -> Any:
    """Every value as target by every value as observed, in the order of the circle."""
    shifts = np.array(ours["shifts"], dtype=float)
    rows = [result["values"].index(value) for value in order]
    seen = order + [value for value in result["observed"] if value not in order]
    columns = [result["observed"].index(value) for value in seen]
    table = shifts[np.ix_(rows, columns)]
    bound = np.nanmax(np.abs(table)) or 1.0
    image = axes.imshow(table, cmap="PuOr_r", vmin=-bound, vmax=bound)
    axes.set_xticks(range(len(seen)), [value.replace("_", "-") for value in seen], rotation=40, ha="right", fontsize=9)
    axes.set_yticks(range(len(order)), [value.replace("_", "-") for value in order], fontsize=9)
    axes.set_xlabel("value observed")
    axes.set_ylabel(f"value dialled to {side.replace('-', '−')}")
    mirrored = "" if side == "+1" else " (mirrored)"
    axes.set_title(f"Who moves along with the neuron map{mirrored}")
    for (row, column), cell in np.ndenumerate(table):
        if not np.isnan(cell):
            shade = "white" if abs(cell) > 0.6 * bound else "black"
            axes.text(column, row, f"{cell:+.2f}", ha="center", va="center", fontsize=7, color=shade)
    return image
