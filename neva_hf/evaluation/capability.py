"""What dials cost on benchmarks: accuracy through EleutherAI's lm-evaluation-harness, paired with the base model's.

The same model object answers the same questions with and without dials, so differences are paired: a question that an
edit changes nothing at adds no noise. Needs lm-eval (`pip install "neva-hf[capability]"`).

Why it has a language model class of its own: the harness runs a question once for each of its answers and computes the
logits of every token. [`continuation_log_probs`] runs the question once and computes the logits of the answers alone. The
tests show that both give the same.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from neva_hf.baselines.method import Dials, Method
from neva_hf.errors import NeVAError

from .capability_tasks import TASKS, harness_tasks
from .shared_context import TOKENS, continuation_log_probs
from .steered import in_force


class Benchmarks:
    """Questions of some benchmarks for one model, ready to be asked under any dials.

    Args:
        model (`nn.Module`): The causal language model, with whatever steers it; it may be wrapped by PEFT.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        data (`str` or `os.PathLike`): The folder that has the questions, at any depth: see `capability_tasks.TASKS`.
        tasks (`Sequence[str]`): Among `lambada`, `arc_easy`, `piqa`, `hellaswag`, `mmlu`.
        limit (`int`, *optional*): Questions of each; all when `None`.
        tokens (`int`): At most about so many tokens in one forward pass.
        share (`bool`): Whether a question is run once for all its answers.

    Raises:
        `NeVAError`: If lm-eval or a file is missing.

    Example:

    ```py
    >>> benchmarks = Benchmarks(model, tokenizer, "FOLDER", ["arc_easy"], limit=100)  # doctest: +SKIP
    >>> before = benchmarks.ask()  # doctest: +SKIP
    >>> after = benchmarks.ask(method, {"power": 1.0})  # doctest: +SKIP
    >>> compared(before["arc_easy"], after["arc_easy"])  # doctest: +SKIP
    ```
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        data: str | os.PathLike[str],
        tasks: Sequence[str] = tuple(TASKS),
        *,
        limit: int | None = 500,
        tokens: int = TOKENS,
        share: bool = True,
    ) -> None:
        _need_lm_eval()
        self.names = list(tasks)
        self._model = model
        with _quiet():
            self._tasks = harness_tasks(self.names, Path(data), limit)
        self._harness = _harness_model(model, tokenizer, tokens, share)

    def ask(self, method: Method | None = None, dials: Dials | None = None) -> dict[str, str]:
        """Asks all questions once.

        Args:
            method ([`Method`], *optional*): What steers the model; without it, the model is asked as it is.
            dials (`Mapping[str, float]`, *optional*): The strengths to put in force for all questions. A method that
                works by a system prompt has it put in front of every question, as the harness does.

        Returns:
            `dict[str, str]`: For each benchmark a `1` (right) or `0` per question, in an order that never changes. Plain
            text, so that it can be kept in JSON.
        """
        import lm_eval

        strengths = dict(dials or {})
        system = method.system(strengths) if method is not None else None
        with nullcontext() if method is None else in_force(self._model, method, strengths), _quiet():
            found = lm_eval.evaluate(
                self._harness, dict(self._tasks), bootstrap_iters=0, system_instruction=system or None
            )
        right = {}
        for name in self.names:
            told = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
            right[name] = "".join("1" if sample[TASKS[name].metric] else "0" for sample in told)
        return right


@dataclass(frozen=True)
class Compared:
    """Accuracy beside the base model's on the same questions.

    Args:
        base (`float`): The base model's accuracy, 0 to 1.
        accuracy (`float`): The accuracy, 0 to 1.
        points (`float`): The difference, in hundredths.
        error (`float`): The standard error of that paired difference, in hundredths; not a number for one question.
        questions (`int`): How many there are.
    """

    base: float
    accuracy: float
    points: float
    error: float
    questions: int

    def as_dict(self) -> dict[str, float | int]:
        """As plain data."""
        return asdict(self)


def compared(base: str | Sequence[str], now: str | Sequence[str]) -> Compared:
    """Compares answers with the base model's to the same questions.

    For question i with d_i = (right now) - (right before), which is 0 wherever nothing changed: the difference is
    mean(d), its standard error std(d) / sqrt(n). For several settings d_i is the mean over settings first, since they
    share their questions.

    Args:
        base (`str` or `Sequence[str]`): A `1` or `0` per question, of the base model; of each setting, if they differ.
        now (`str` or `Sequence[str]`): The same of the dialled model, for one setting or several.

    Returns:
        [`Compared`]: The comparison.

    Raises:
        `NeVAError`: If they are not answers to the same number of questions.

    Example:

    ```py
    >>> from neva_hf.evaluation.capability import compared
    >>> compared("1100", "1000").points
    -25.0
    ```
    """
    after = _table(now)
    before = np.broadcast_to(_table(base), after.shape) if _table(base).shape[1] == after.shape[1] else None
    if before is None or after.shape[1] == 0:
        raise NeVAError("The answers compared are not to the same questions: their numbers differ, or there are none.")
    gap = 100 * (after - before).mean(0)
    error = float(gap.std(ddof=1) / math.sqrt(len(gap))) if len(gap) > 1 else math.nan
    return Compared(float(before.mean()), float(after.mean()), float(gap.mean()), error, len(gap))


def table(base: Mapping[str, str], settings: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, Compared]]:
    """Every setting beside the base model, for every benchmark.

    Args:
        base (`Mapping[str, str]`): Of the base model, from [`Benchmarks.ask`].
        settings (`Mapping[str, Mapping[str, str]]`): Name of a setting -> what it gave.

    Returns:
        `dict[str, dict[str, Compared]]`: Name of the setting -> benchmark -> comparison.
    """
    return {name: {task: compared(base[task], found[task]) for task in base} for name, found in settings.items()}


def _table(answers: str | Sequence[str]) -> np.ndarray:
    rows = [answers] if isinstance(answers, str) else list(answers)
    return np.array([[int(one) for one in row] for row in rows], dtype=float).reshape(len(rows), -1)


def _need_lm_eval() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise NeVAError('Benchmarks need lm-eval: pip install "neva-hf[capability]".') from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the harness' notes off the terminal: they are about models and data sets that come by name."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _harness_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, tokens: int, share: bool) -> Any:
    """The harness' model of transformers, with its inner loop replaced."""
    from lm_eval.models.huggingface import HFLM
    from tqdm.auto import tqdm

    class SharedContextLM(HFLM):
        """As `HFLM`, but contexts are run once and logits are computed at continuations only."""

        def _loglikelihood_tokens(
            self,
            requests: list[tuple[tuple[str, str], list[int], list[int]]],
            disable_tqdm: bool = False,
            override_bs: int | None = None,
        ) -> list[tuple[float, bool]]:
            pairs = []
            for _, context, continuation in requests:
                # What is too long loses its beginning, as in the harness; the last token is never an input.
                room = self.max_length + 1 - len(continuation)
                pairs.append((context[-room:], continuation))
            with tqdm(total=len(pairs), disable=disable_tqdm, desc="benchmark answers") as bar:
                found = continuation_log_probs(self.model, pairs, tokens=tokens, share=share, done=bar.update)
            for (asked, _, _), answer in zip(requests, found, strict=True):
                if asked is not None:
                    self.cache_hook.add_partial("loglikelihood", asked, answer)
            return found

    # The harness takes transformers' own model: what PEFT put into it stays in it.
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    with _quiet():
        return SharedContextLM(pretrained=inner, tokenizer=tokenizer, batch_size=1)
