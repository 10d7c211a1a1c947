"""What dials cost on benchmarks: LAMBADA and ARC-easy accuracy of the base model and of each value at +1.

    pip install lm-eval
    python benchmarks/capability.py MAP --data FOLDER

Measured by EleutherAI's lm-evaluation-harness, zero-shot, on the first questions of each task. FOLDER holds
`lambada_openai.jsonl` and `arc_easy.jsonl` of MosaicML's llm-foundry (scripts/eval/local_data), so no network is needed.
The very same model object answers with and without an edit: only its dials are turned. Written to
`benchmarks/results/capability_MAP.json` and `.md`; an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from kept import Kept, Piece, map_fingerprint, work_off

from neva_hf import NeuronMap, NeVAModel, load_base

# As the harness' own `lambada_openai` and `arc_easy`, but for the names of the fields.
TASKS: dict[str, dict[str, Any]] = {
    "lambada_openai": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + continuation}}",
    },
    "arc_easy": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}\nAnswer:",
        "doc_to_target": "{{gold}}",
        "doc_to_choice": "{{choices}}",
    },
}
NAMES = {"lambada_openai": "LAMBADA", "arc_easy": "ARC-easy"}


def task(name: str, folder: Path) -> dict[str, Any]:
    """A task of the harness that reads a local file."""
    return {
        "task": f"{name}_local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str((folder / f"{name}.jsonl").resolve())}},
        "test_split": "test",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        **TASKS[name],
    }


def answers(harness: Any, model: NeVAModel, folder: Path, limit: int, strengths: dict[str, float]) -> dict[str, str]:
    """Task -> which questions the model gets right at some strengths: a `1` or a `0` for each, in order."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    model.set_strengths(strengths)
    try:
        found = lm_eval.simple_evaluate(
            harness,
            tasks=[task(name, folder) for name in TASKS],
            task_manager=TaskManager(include_defaults=False),
            num_fewshot=0,
            limit=limit,
            bootstrap_iters=0,
        )
    finally:
        model.set_strengths({})
    right = {}
    for name in TASKS:
        told = sorted(found["samples"][f"{name}_local"], key=lambda sample: sample["doc_id"])
        right[name] = "".join("1" if sample["acc"] else "0" for sample in told)
    return right


def compared(base: str, edited: str) -> dict[str, float]:
    """Accuracy, the difference from the base model's in points, and the standard error of that paired difference.

    The same questions are answered, so the error is the one of the mean of (right now) - (right before), which is 0
    for all the questions that an edit changes nothing at.

    Args:
        base (`str`): A `1` or `0` per question, of the base model.
        edited (`str`): The same of the edited one.

    Returns:
        `dict[str, float]`: `accuracy` from 0 to 1, `points` and `error` in hundredths.
    """
    before, now = (np.array([int(one) for one in answered], dtype=float) for answered in (base, edited))
    gap = 100 * (now - before)
    error = float(gap.std(ddof=1) / math.sqrt(len(gap))) if len(gap) > 1 else math.nan
    return {"accuracy": float(now.mean()), "points": float(gap.mean()), "error": error}


def report(kept: Kept, names: list[str]) -> dict[str, Any]:
    """Every setting compared with the base model, and the mean over settings of one sign."""
    base = kept["base"]
    rows = {name: {one: compared(base[one], kept[name][one]) for one in TASKS} for name in names}
    means = {}
    for side in dict.fromkeys(name.split("/")[0] for name in names):
        here = [name for name in names if name.startswith(side)]
        means[side] = {
            # Over all settings of a question first: they share the questions.
            one: mean_of([base[one]] * len(here), [kept[name][one] for name in here])
            for one in TASKS
        }
    return {
        "base": {
            one: {"accuracy": base[one].count("1") / len(base[one]), "questions": len(base[one])} for one in TASKS
        },
        "settings": rows,
        "means": means,
    }


def mean_of(base: list[str], edited: list[str]) -> dict[str, float]:
    """As [`compared`], for the mean over several settings; the error is over questions."""
    tables = [np.array([[int(one) for one in row] for row in rows], dtype=float) for rows in (base, edited)]
    gap = 100 * (tables[1] - tables[0]).mean(0)
    error = float(gap.std(ddof=1) / math.sqrt(len(gap))) if len(gap) > 1 else math.nan
    return {"accuracy": float(tables[1].mean()), "points": float(gap.mean()), "error": error}


def markdown(result: dict[str, Any]) -> str:
    """The result as a table."""
    counts = ", ".join(f"{NAMES[one]}: {found['questions']}" for one, found in result["base"].items())
    lines = [
        f"# Benchmarks of {result['map']}",
        "",
        f"Accuracy of {result['base_model']} ({result['dtype']}) and of each value dialled to +1 or -1, zero-shot, "
        f"lm-evaluation-harness. Questions, from the front: {counts}. In brackets: the difference from the base model in "
        "points, and the standard error of that paired difference.",
        "",
        f"| strength | value | {' | '.join(NAMES[one] for one in TASKS)} |",
        f"|---:|---|{'---:|' * len(TASKS)}",
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
    parser.add_argument("--base", help="the base model, if not the one that the map names: folder, GGUF or repository")
    parser.add_argument("--dtype", default="auto", help="the type to compute in, for the base and the edited model")
    parser.add_argument("--limit", type=int, default=500, help="questions of each task")
    parser.add_argument("--signs", choices=["+1", "-1", "both"], default="+1")
    parser.add_argument("--values", nargs="+", help="only these")
    parser.add_argument("--rows", type=int, default=8, help="questions in one forward pass")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    from lm_eval.models.huggingface import HFLM

    neuron_map = NeuronMap.from_pretrained(options.map)
    base, tokenizer = load_base(options.base or neuron_map.base_model, dtype=options.dtype)
    model = NeVAModel.from_map(base, neuron_map)
    # The harness takes transformers' own model, whose down projections are dialled from outside.
    harness = HFLM(pretrained=base, tokenizer=tokenizer, batch_size=options.rows)
    name = f"capability_{Path(options.map).resolve().name}"
    key = {
        "map": map_fingerprint(neuron_map),
        "base": [options.base or neuron_map.base_model, str(base.dtype)],
        "limit": options.limit,
    }
    kept = Kept(options.output, name, key)
    values = options.values or neuron_map.values
    signs = [1, -1] if options.signs == "both" else [int(options.signs)]
    settings = {f"{sign:+d}/{value}": {value: float(sign)} for sign in signs for value in values}
    run = partial(answers, harness, model, options.data, options.limit)
    work_off(kept, [Piece(one, 1.0, partial(run, dials)) for one, dials in {"base": {}, **settings}.items()])
    result = {
        "map": Path(options.map).resolve().name,
        "base_model": neuron_map.base_model,
        "dtype": str(base.dtype).removeprefix("torch."),
        **report(kept, list(settings)),
    }
    (options.output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    words = markdown(result)
    (options.output / f"{name}.md").write_text(words)
    print(words)


if __name__ == "__main__":
    main()
