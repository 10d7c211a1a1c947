"""What the dials of a map do: margins and damage at several strengths, as JSON, Markdown and a picture.

    python benchmarks/dials.py MAP --split test --limit 12 --output benchmarks/results/dials.json --picture dials.png

For every value and strength: the margin shift of the value and of every other one (each against the replies of all
values but the two), KL divergence and perplexity on held-out neutral text. `--from FILE` draws a result again.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neva_hf import NeVAModel, load_scenarios
from neva_hf.measure import damage, margins, scenario_log_probs
from neva_hf.scenarios import load_neutral_texts

STRENGTHS = (-2.0, -1.0, 1.0, 2.0)


def measure(source: str, split: str, limit: int | None, texts: int) -> dict[str, Any]:
    """Measures a map. See the top of the file."""
    started = time.time()
    model = NeVAModel.from_pretrained(source)
    tokenizer = model.tokenizer
    assert tokenizer is not None
    scenarios = load_scenarios("schwartz", split, limit=limit)
    base = scenario_log_probs(model, tokenizer, scenarios)
    settings = [{value: strength} for value in model.values for strength in STRENGTHS]
    costs = []
    for start in range(0, len(settings), 10):
        costs += damage(model, tokenizer, load_neutral_texts("heldout", texts), settings[start : start + 10])
    rows = []
    for setting, cost in zip(settings, costs, strict=True):
        ((target, strength),) = setting.items()
        with model.strengths(setting):
            edited = scenario_log_probs(model, tokenizer, scenarios)
        shifts = {}
        for observed in model.values:
            left_out = () if observed == target else (target,)
            before, after = margins(base, observed, left_out), margins(edited, observed, left_out)
            shifts[observed] = float(np.mean(after) - np.mean(before))
        rows.append(
            {
                "target": target,
                "strength": strength,
                "margin_shift": shifts,
                "kl": cost.kl,
                "perplexity_ratio": cost.perplexity_ratio,
            }
        )
        spent = time.time() - started
        print(f"{target:>16} {strength:+.0f}  margin {shifts[target]:+.3f}  KL {cost.kl:.3f}  [{spent:.0f} s]")
    return {
        "map": Path(source).name,
        "base_model": model.peft_config["default"].base_model_name_or_path,
        "values": model.values,
        "neurons_per_value": {
            value: int(sum((layer.neva_shift["default"][row] != 0).sum() for layer in _layers(model)))
            for row, value in enumerate(model.values)
        },
        "split": split,
        "scenarios": len(scenarios),
        "neutral_texts": texts,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "seconds": round(time.time() - started, 1),
        "rows": rows,
    }


def _layers(model: NeVAModel) -> list[Any]:
    from neva_hf.dial import neva_layers

    return neva_layers(model)


def summary(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Per strength: mean margin shift of the target, leakage (NLR on margins), KL, perplexity.

    NLR: the mean over other values of the positive part of their margin shift, over the target's; sums over targets
    are divided. Negative strengths are mirrored.
    """
    found = {}
    for strength in STRENGTHS:
        rows = [row for row in result["rows"] if row["strength"] == strength]
        sign = 1 if strength > 0 else -1
        own = [sign * row["margin_shift"][row["target"]] for row in rows]
        rises = [
            np.mean([max(0.0, sign * s) for value, s in row["margin_shift"].items() if value != row["target"]])
            for row in rows
        ]
        found[f"{strength:+g}"] = {
            "target": float(np.mean(own)),
            "right_direction": int(sum(shift > 0 for shift in own)),
            "nlr": float(np.sum(rises) / np.sum(own)),
            "kl": float(np.mean([row["kl"] for row in rows])),
            "perplexity_ratio": float(np.mean([row["perplexity_ratio"] for row in rows])),
        }
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    """The picture: dose curves on the left, who moves with whom on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    values = result["values"]
    by_setting = {(row["target"], row["strength"]): row for row in result["rows"]}
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 5.2), width_ratios=[1, 1.12], layout="constrained")
    colours = plt.get_cmap("hsv")(np.linspace(0, 1, len(values), endpoint=False)) * [0.82, 0.82, 0.82, 1]
    xs = sorted([*STRENGTHS, 0.0])
    ends = []
    for value, colour in zip(values, colours, strict=True):
        ys = [0.0 if x == 0 else by_setting[value, x]["margin_shift"][value] for x in xs]
        left.plot(xs, ys, marker="o", markersize=3.5, color=colour, linewidth=1.8)
        ends.append([ys[-1], value, colour])
    ends.sort(key=lambda end: end[0])
    span = ends[-1][0] - min(by_setting[value, xs[0]]["margin_shift"][value] for value in values)
    # Labels stand in the order of the curves' ends, far enough from each other to be read.
    step, middle = span / 21, float(np.mean([end[0] for end in ends]))
    for place, (reached, value, colour) in enumerate(ends):
        height = middle + step * (place - (len(ends) - 1) / 2)
        left.plot([xs[-1] + 0.05, xs[-1] + 0.3], [reached, height], color=colour, linewidth=0.7)
        left.annotate(value.replace("_", "-"), (xs[-1] + 0.35, height), color=colour, va="center", fontsize=9)
    left.set_ylim(top=max(left.get_ylim()[1], middle + step * len(ends) / 2))
    left.axhline(0, color="0.7", linewidth=0.8)
    left.axvline(0, color="0.7", linewidth=0.8)
    left.set_xlim(xs[0] - 0.1, xs[-1] + 1.6)
    left.set_xticks(xs)
    left.set_xlabel("strength of the dial (1 costs 0.05 nats/token of KL divergence)")
    left.set_ylabel("margin of the value, nats per token")
    left.set_title("Each value follows its dial")
    left.spines[["top", "right"]].set_visible(False)

    table = np.array([[by_setting[target, 1.0]["margin_shift"][seen] for seen in values] for target in values])
    bound = np.abs(table).max()
    image = right.imshow(table, cmap="PuOr_r", vmin=-bound, vmax=bound)
    names = [value.replace("_", "-") for value in values]
    right.set_xticks(range(len(values)), names, rotation=40, ha="right", fontsize=9)
    right.set_yticks(range(len(values)), names, fontsize=9)
    right.set_xlabel("value observed")
    right.set_ylabel("value dialled to +1")
    right.set_title("The others hardly move")
    for row in range(len(values)):
        for column in range(len(values)):
            shade = "white" if abs(table[row, column]) > 0.6 * bound else "black"
            right.text(column, row, f"{table[row, column]:+.2f}", ha="center", va="center", fontsize=7, color=shade)
    figure.colorbar(image, ax=right, label="margin shift, nats per token", shrink=0.85)
    figure.suptitle(
        f"{result['base_model'].split('/')[-1]}, {max(result['neurons_per_value'].values())} neurons per value, "
        f"{result['scenarios']} unseen questions ({result['split']} split)",
        fontsize=10,
        color="0.35",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("map", nargs="?", help="a neuron map: folder or repository")
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/dials.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/dials.png"))
    parser.add_argument("--from", dest="source", type=Path, help="draw this result again")
    options = parser.parse_args()
    if options.source is None and options.map is None:
        parser.error("give a map, or --from FILE")
    result = (
        json.loads(options.source.read_text())
        if options.source
        else measure(options.map, options.split, options.limit, options.texts)
    )
    if options.source is None:
        result["summary"] = summary(result)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    for strength, line in summary(result).items():
        print(strength, {key: round(value, 3) for key, value in line.items()})
    draw(result, options.picture)
    print(f"picture: {options.picture}")


if __name__ == "__main__":
    main()
