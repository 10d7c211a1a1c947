"""Benchmark questions from local files, as tasks of EleutherAI's lm-evaluation-harness.

The prompts are those of the harness' own tasks of these names. Questions are drawn once, with a fixed seed, so the first
few of a task are a fair sample of all of them (the files of HellaSwag and MMLU are sorted by subject) and the same ones
for every model.
"""

from __future__ import annotations

import bz2
import csv
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neva_hf.errors import NeVAError

SEED = 0

_MULTIPLE_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{query}}",
    "doc_to_target": "{{gold}}",
    "doc_to_choice": "{{choices}}",
}


@dataclass(frozen=True)
class Task:
    """A benchmark and how to read its file.

    Args:
        label (`str`): What people read.
        files (`tuple[str, ...]`): Names that its file may have.
        read (`Callable[[Path], list[dict]]`): Gives its questions.
        config (`dict[str, Any]`): Of the harness' task.
        metric (`str`): `"acc"`, or `"acc_norm"` where the custom is to divide an answer's log-probability by its
            length in characters (HellaSwag).
        chance (`float`): The accuracy of guessing.
    """

    label: str
    files: tuple[str, ...]
    read: Callable[[Path], list[dict[str, Any]]]
    config: dict[str, Any]
    metric: str = "acc"
    chance: float = 0.0


def read_lambada(path: Path) -> list[dict[str, Any]]:
    """JSON Lines with `context` and `continuation` (the last word), as in MosaicML's llm-foundry."""
    return [{"context": row["context"], "word": row["continuation"].strip()} for row in _json_lines(path)]


def read_choices(path: Path) -> list[dict[str, Any]]:
    """JSON Lines with `query`, `choices` and `gold` (the number of the right one), as in MosaicML's llm-foundry."""
    return [
        {"query": f"{row['query'].strip()}\nAnswer:", "choices": row["choices"], "gold": int(row["gold"])}
        for row in _json_lines(path)
    ]


def read_hellaswag(path: Path) -> list[dict[str, Any]]:
    """Six lines to a question: the context, the number of the right ending, four endings. May be bzip2-compressed."""
    text = (bz2.decompress(path.read_bytes()) if path.suffix == ".bz2" else path.read_bytes()).decode("utf-8")
    lines = text.splitlines()
    if len(lines) % 6:
        raise NeVAError(f"{path} has {len(lines)} lines; a file of HellaSwag has six to each question.")
    return [
        {
            "query": _without_marks(lines[at]),
            "choices": [_without_marks(line) for line in lines[at + 2 : at + 6]],
            "gold": int(lines[at + 1]),
        }
        for at in range(0, len(lines), 6)
    ]


def read_mmlu(path: Path) -> list[dict[str, Any]]:
    """A table with the columns `subject`, `question`, `choice0` to `choice3` and `answer` (0 to 3)."""
    found = []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            options = "\n".join(f"{letter}. {row[f'choice{place}']}" for place, letter in enumerate("ABCD"))
            about = row["subject"].replace("_", " ")
            opening = f"The following are multiple choice questions (with answers) about {about}."
            found.append(
                {
                    "query": f"{opening}\n\n{row['question'].strip()}\n{options}\nAnswer:",
                    "choices": list("ABCD"),
                    "gold": int(row["answer"]),
                }
            )
    return found


TASKS: dict[str, Task] = {
    "lambada": Task(
        "LAMBADA",
        ("lambada_openai.jsonl",),
        read_lambada,
        {"output_type": "loglikelihood", "doc_to_text": "{{context}}", "doc_to_target": "{{' ' + word}}"},
    ),
    "arc_easy": Task("ARC-easy", ("arc_easy.jsonl",), read_choices, _MULTIPLE_CHOICE, chance=0.25),
    "piqa": Task("PIQA", ("piqa.jsonl",), read_choices, _MULTIPLE_CHOICE, chance=0.5),
    "hellaswag": Task(
        "HellaSwag",
        ("hellaswag_val_full.txt.bz2", "hellaswag_val_full.txt"),
        read_hellaswag,
        _MULTIPLE_CHOICE,
        metric="acc_norm",
        chance=0.25,
    ),
    "mmlu": Task("MMLU", ("mmlu_test.csv",), read_mmlu, _MULTIPLE_CHOICE, chance=0.25),
}
"""The benchmarks that are known, by name."""


def find_file(name: str, folder: Path) -> Path:
    """The file of a benchmark, anywhere below a folder.

    Args:
        name (`str`): A key of `TASKS`.
        folder (`Path`): Where to look.

    Returns:
        `Path`: The file.

    Raises:
        `NeVAError`: If there is no such benchmark or no such file.
    """
    if name not in TASKS:
        raise NeVAError(f"There is no benchmark {name!r}: choose among {list(TASKS)}.")
    if not folder.is_dir():
        raise NeVAError(f"There is no folder {str(folder)!r} with benchmark questions.")
    for file in TASKS[name].files:
        if found := sorted(folder.rglob(file)):
            return found[0]
    raise NeVAError(
        f"The questions of {TASKS[name].label} are missing: no {' or '.join(TASKS[name].files)} in {folder} or its "
        f"folders. {SOURCES[name]}"
    )


SOURCES = {
    **dict.fromkeys(
        ("lambada", "arc_easy", "piqa"), "It is in MosaicML's llm-foundry on GitHub, below scripts/eval/local_data."
    ),
    "hellaswag": "It is in klosax/hellaswag_text_data on GitHub.",
    "mmlu": "It is the test split of MMLU (hendrycks/test on GitHub) as one table with the columns subject, question, "
    "choice0 to choice3, answer.",
}
"""Where to get what is missing."""


def questions(name: str, folder: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Questions of a benchmark, drawn with a fixed seed.

    Args:
        name (`str`): A key of `TASKS`.
        folder (`Path`): Where its file is.
        limit (`int`, *optional*): At most so many.

    Returns:
        `list[dict]`: With the fields that the benchmark's configuration speaks of.

    Raises:
        `NeVAError`: If the file is missing or is not what it should be.
    """
    path = find_file(name, folder)
    try:
        found = TASKS[name].read(path)
    except (KeyError, TypeError, ValueError, OSError) as error:
        if isinstance(error, NeVAError):
            raise
        raise NeVAError(f"{path} is no file of {TASKS[name].label} ({type(error).__name__}: {error}).") from error
    if not found:
        raise NeVAError(f"{path} holds no questions.")
    random.Random(SEED).shuffle(found)
    return found[:limit]


def harness_tasks(names: Sequence[str], folder: Path, limit: int | None = None) -> dict[str, Any]:
    """Benchmarks as task objects of lm-eval, in memory.

    Args:
        names (`Sequence[str]`): Keys of `TASKS`.
        folder (`Path`): Where their files are.
        limit (`int`, *optional*): At most so many questions of each.

    Returns:
        `dict[str, lm_eval.api.task.ConfigurableTask]`: For `lm_eval.evaluate`.
    """
    import datasets
    from lm_eval.api.task import ConfigurableTask

    def one(name: str) -> Any:
        rows = questions(name, folder, limit)
        metrics = ["acc"] if TASKS[name].metric == "acc" else ["acc", TASKS[name].metric]
        return ConfigurableTask(
            config={
                "task": name,
                "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
                "test_split": "test",
                "num_fewshot": 0,
                "metric_list": [{"metric": one, "aggregation": "mean", "higher_is_better": True} for one in metrics],
                **TASKS[name].config,
            }
        )

    return {name: one(name) for name in names}


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def _without_marks(text: str) -> str:
    """HellaSwag's WikiHow part has marks in square brackets that are no part of the text; `[title]` ends a sentence."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")
