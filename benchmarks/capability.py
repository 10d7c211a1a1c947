"""What dials cost on benchmarks: accuracy of the base model and of each value at +1 and -1, on 500 questions of each task.

    pip install "neva-hf[capability]"
    python benchmarks/capability.py MAP --data FOLDER --dtype bfloat16
    python benchmarks/capability.py MAP --data FOLDER --signs +1 & python ... --signs -1   # on two cores

Measured by EleutherAI's lm-evaluation-harness, zero-shot (`neva_hf.evaluation.capability` says what FOLDER holds and which
questions are drawn). The very same model object answers with and without an edit: only its dials are turned. Written to
`benchmarks/results/capability_MAP.json` and `.md`; an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from neva_hf import NeuronMap, NeVAModel, load_base
from neva_hf.evaluation.capability import Benchmarks, compared
from neva_hf.evaluation.kept import Kept, Piece, map_fingerprint, work_off

NAMES = {"lambada": "LAMBADA", "arc_easy": "ARC-easy", "piqa": "PIQA", "hellaswag": "HellaSwag", "mmlu": "MMLU"}


def answers(benchmarks: Benchmarks, model: NeVAModel, strengths: dict[str, float]) -> dict[str, str]:
    """Task -> which questions the model gets right at some strengths: a `1` or a `0` for each, in order."""
    with model.strengths(strengths):
        return benchmarks.ask()


def report(kept: Kept, names: list[str], tasks: list[str]) -> dict[str, Any]:
    """Every setting compared with the base model, and the mean over the settings of one sign."""

    def beside(one: str, these: list[str]) -> dict[str, float]:
        return asdict(compared(kept["base"][one], [kept[name][one] for name in these]))

    sides = dict.fromkeys(name.split("/")[0] for name in names)
    means = {side: [name for name in names if name.startswith(side)] for side in sides}
    return {
        "base": {
            one: {
                "accuracy": kept["base"][one].count("1") / len(kept["base"][one]),
                "questions": len(kept["base"][one]),
            }
            for one in tasks
        },
        "settings": {name: {one: beside(one, [name]) for one in tasks} for name in names},
        "means": {side: {one: beside(one, these) for one in tasks} for side, these in means.items()},
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as a table."""
    counts = ", ".join(f"{NAMES[one]}: {found['questions']}" for one, found in result["base"].items())
    lines = [
        f"# Benchmarks of {result['map']}",
        "",
        f"Accuracy of {result['base_model']} ({result['dtype']}) and of each value dialled to +1 or -1, zero-shot, "
        f"lm-evaluation-harness. Questions: {counts}. In brackets: the difference from the base model in points, and the "
        "standard error of that paired difference.",
        "",
        f"| strength | value | {' | '.join(NAMES[one] for one in result['base'])} |",
        f"|---:|---|{'---:|' * len(result['base'])}",
        f"| 0 | | {' | '.join(format(found['accuracy'], '.1%') for found in result['base'].values())} |",
    ]
    for name, found in {
        **result["settings"],
        **{f"{side}/*mean*": one for side, one in result["means"].items()},
    }.items():
        side, value = name.split("/")
        cells = [f"{one['accuracy']:.1%} ({one['points']:+.1f} ± {one['error']:.1f})" for one in found.values()]
        lines.append(f"| {side} | {value} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("map", help="a neuron map: folder or repository")
    parser.add_argument("--data", type=Path, required=True, help="the folder with the questions")
    parser.add_argument("--tasks", nargs="+", default=["lambada", "arc_easy"], choices=list(NAMES))
    parser.add_argument("--base", help="the base model, if not the one that the map names: folder, GGUF or repository")
    parser.add_argument("--dtype", default="auto", help="the type to compute in, for the base and the edited model")
    parser.add_argument("--limit", type=int, default=500, help="questions of each task")
    parser.add_argument("--signs", choices=["+1", "-1", "both"], default="both")
    parser.add_argument("--values", nargs="+", help="only these")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)

    neuron_map = NeuronMap.from_pretrained(options.map)
    base, tokenizer = load_base(options.base or neuron_map.base_model, dtype=options.dtype)
    dtype = str(base.dtype).removeprefix("torch.")
    model = NeVAModel.from_map(base, neuron_map)
    benchmarks = Benchmarks(base, tokenizer, options.data, options.tasks, limit=options.limit)
    name = f"capability_{Path(options.map).resolve().name}"
    key = {
        "map": map_fingerprint(neuron_map),
        "base": [options.base or neuron_map.base_model, dtype],
        "asked": [options.tasks, options.limit],
    }
    kept = Kept(options.output / ".state", name, key, options.signs)
    values = options.values or neuron_map.values
    signs = [1, -1] if options.signs == "both" else [int(options.signs)]
    settings = {f"{sign:+d}/{value}": {value: float(sign)} for sign in signs for value in values}
    run = partial(answers, benchmarks, model)
    pieces = [Piece(one, 1.0, partial(run, dials)) for one, dials in {"base": {}, **settings}.items()]
    work_off(kept, pieces, lambda line: print(line, flush=True))
    # (also those of the other sign, if another run has measured them)
    measured = [f"{sign:+d}/{value}" for sign in (1, -1) for value in values if f"{sign:+d}/{value}" in kept]
    result = {
        "map": Path(options.map).resolve().name,
        "base_model": neuron_map.base_model,
        "dtype": dtype,
        **report(kept, measured, options.tasks),
    }
    (options.output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    words = markdown(result)
    (options.output / f"{name}.md").write_text(words)
    print(words)


if __name__ == "__main__":
    main()
