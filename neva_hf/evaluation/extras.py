"""What is measured beside margins, where it is asked for: benchmarks, WikiText, and what generated answers are like.

It costs more than all the rest, and needs packages, files or an endpoint: everything is imported when it is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from neva_hf.baselines.method import Dials, Method
from neva_hf.errors import NeVAError
from neva_hf.scenarios import Scenario
from neva_hf.values import ValueSystem

from .candidate import Extra
from .tables import plain


@dataclass(frozen=True)
class ExtraOptions:
    """Which further measurements are made. All are made of every value at the first strength.

    Args:
        tasks (`list[str]`): Benchmarks, see `capability_tasks.TASKS`; none when empty.
        data (`str`, *optional*): The folder with their questions.
        questions (`int`): Questions of each.
        wikitext (`str`, *optional*): A text to measure perplexity on.
        windows (`int`): So many windows of it.
        answers (`int`): Scenarios whose questions are answered; 0 generates nothing.
        max_new_tokens (`int`): The longest answer.
        judges (`list[str]`): Who judges the answers: `"llm"`, `"text"`. (`"choice"` comes with the tables.)
        judge_options (`dict[str, dict[str, Any]]`): Options of each judge.
    """

    tasks: list[str] = field(default_factory=list)
    data: str | None = None
    questions: int = 100
    wikitext: str | None = None
    windows: int = 20
    answers: int = 0
    max_new_tokens: int = 80
    judges: list[str] = field(default_factory=list)
    judge_options: dict[str, dict[str, Any]] = field(default_factory=dict)


def extras_of(
    options: ExtraOptions,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    scenarios: Sequence[Scenario],
    values: Sequence[str],
    strength: float,
    system: ValueSystem | None,
    state: Path,
) -> list[Extra]:
    """The further measurements that are asked for.

    Args:
        options ([`ExtraOptions`]): Which.
        model (`nn.Module`): The model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        scenarios (`Sequence[Scenario]`): Whose questions are answered.
        values (`Sequence[str]`): The values to dial.
        strength (`float`): At which strength.
        system ([`ValueSystem`], *optional*): Says what values mean, for judges.
        state (`Path`): A folder for what a judge said.

    Returns:
        `list[Extra]`: One per measurement.

    Raises:
        `NeVAError`: If a package, a file or an option is missing.
    """
    settings: list[Dials] = [{value: strength} for value in values]
    found = []
    if options.tasks:
        found.append(_capability(options, model, tokenizer, settings))
    if options.wikitext is not None:
        found.append(_wikitext(options, model, tokenizer, settings))
    judges = [name for name in options.judges if name != "choice"]
    if judges and options.answers < 1:
        raise NeVAError(
            f"The judge {judges[0]!r} reads answers: say for how many questions they are generated (--answers)."
        )
    if options.answers:
        questions = [scenario.question for scenario in scenarios[: options.answers]]
        found.append(_answers(options, model, tokenizer, settings, questions))
        found += [_judged(name, options, settings, list(values), system, state) for name in judges]
    return found


def _capability(
    options: ExtraOptions, model: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: list[Dials]
) -> Extra:
    from .capability import Benchmarks, compared

    if options.data is None:
        raise NeVAError("Benchmarks need their questions: name the folder that has them with --data.")
    benchmarks = Benchmarks(model, tokenizer, options.data, options.tasks, limit=options.questions)

    def ask(method: Method | None, dials: list[Dials], found: Any) -> list[dict[str, str]]:
        return [benchmarks.ask(method, one) for one in dials]

    def sum_up(base: Any, found: Any) -> dict[str, Any]:
        told = base if found is None else found
        return {
            task: {
                key: plain(number)
                for key, number in compared(base[0][task], [one[task] for one in told]).as_dict().items()
            }
            for task in options.tasks
        }

    key = [options.tasks, options.questions]
    return Extra("capability", key, ask, 150.0 * options.questions * len(options.tasks), settings, sum_up=sum_up)


def _wikitext(
    options: ExtraOptions, model: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: list[Dials]
) -> Extra:
    from .kept import fingerprint
    from .wikitext import wikitext_perplexity, wikitext_windows

    windows = wikitext_windows(tokenizer, str(options.wikitext), options.windows)

    def read(method: Method | None, dials: list[Dials], found: Any) -> list[dict[str, Any]]:
        if method is None:
            return []
        return [asdict(one) for one in wikitext_perplexity(model, tokenizer, windows, method, dials)]

    def sum_up(base: Any, found: Any) -> dict[str, Any] | None:
        if not found:
            return None
        means = {key: plain(np.mean([one[key] for one in found])) for key in ("ratio", "kl")}
        return {"base_perplexity": found[0]["base"], "tokens": found[0]["tokens"], **means, "values": found}

    return Extra("wikitext", fingerprint(windows), read, float(sum(map(len, windows))), settings, sum_up=sum_up)


def _answers(
    options: ExtraOptions,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    settings: list[Dials],
    questions: list[str],
) -> Extra:
    from .generations import Answer, Sampling, generate_answers
    from .text_damage import text_damage

    def answer(method: Method | None, dials: list[Dials], found: Any) -> list[list[dict[str, Any]]]:
        sampling = Sampling(max_new_tokens=options.max_new_tokens)
        made = generate_answers(model, tokenizer, questions, dials, method, sampling=sampling)
        return [[one.as_dict() for one in row] for row in made]

    def sum_up(base: Any, found: Any) -> dict[str, Any]:
        told = base if found is None else found
        damage = text_damage([Answer(**one) for row in told for one in row]).as_dict()
        texts = [{"dials": row[0]["dials"], "texts": [one["text"] for one in row]} for row in told]
        return {
            "damage": {key: plain(number) for key, number in damage.items()},
            "questions": questions,
            "answers": texts,
        }

    # A token that is written alone takes about as long as ten that are read together.
    cost = 10.0 * len(questions) * options.max_new_tokens
    return Extra("answers", [questions, options.max_new_tokens], answer, cost, settings, sum_up=sum_up)


def _judged(
    name: str, options: ExtraOptions, settings: list[Dials], values: list[str], system: ValueSystem | None, state: Path
) -> Extra:
    from .judges import make_judge
    from .verdicts import Item, Verdicts, share_change

    given = dict(options.judge_options.get(name, {}))
    key = {option: item for option, item in given.items() if option != "api_key"}
    if name == "llm":
        given |= {"cache": state / "judge.jsonl", **({"system": system} if system is not None else {})}
    judge = make_judge(name, **given)

    def ask(method: Method | None, dials: list[Dials], found: Any) -> dict[str, Any]:
        # The base model's answers are judged for every value, those of a dial for its own.
        rows = found * len(values) if method is None else found
        items = [
            Item(one["question"], one["text"], value) for value, row in zip(values, rows, strict=True) for one in row
        ]
        told = judge(items)
        width = len(items) // len(values)
        shares = {value: told.prioritized[at * width : (at + 1) * width] for at, value in enumerate(values)}
        return {"note": told.note, "counts": told.counts, "prioritized": shares}

    def sum_up(base: Any, found: Any) -> dict[str, Any]:
        before = {value: Verdicts(name, row) for value, row in base["prioritized"].items()}
        if found is None:
            every = Verdicts(name, [one for row in before.values() for one in row.prioritized])
            return {"note": base["note"], "csr": plain(every.share)}
        after = {value: Verdicts(name, row) for value, row in found["prioritized"].items()}
        both = [Verdicts(name, [one for row in side.values() for one in row.prioritized]) for side in (before, after)]
        return {
            "note": found["note"],
            "csr": plain(both[1].share),
            "csr_change": [plain(number) for number in share_change(both[0], both[1])],
            "unread": both[1].unread,
            "values": {
                value: {
                    "csr_before": plain(before[value].share),
                    "csr": plain(after[value].share),
                    "csr_change": [plain(number) for number in share_change(before[value], after[value])],
                }
                for value in values
            },
        }

    return Extra(f"judged_{name}", key, ask, 1.0, settings, after="answers", sum_up=sum_up)
