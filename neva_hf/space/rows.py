"""Several answers of one model, made as rows of one batch and read while they grow.

Invariants:
- All rows draw from the same random numbers, which depend on the seed and the position alone. So rows differ by their
  dials and by nothing else, and a row at strength 0 reads as the base model alone would with that seed.
- Whoever stops reading stops the model: at its next token, or before its first.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from neva_hf.errors import NeVAError
from neva_hf.strengths import Strengths
from neva_hf.talk import NEXT_QUESTION

from .limits import Limits, Worker

logger = logging.getLogger(__name__)

_TOP_P = 0.95
# The nucleus is looked for among so many tokens: sorting a whole vocabulary at every token would cost more than a layer.
_AMONG = 256


@dataclass(frozen=True)
class Sampling:
    """How answers are made.

    Args:
        seed (`int`): For sampling.
        max_new_tokens (`int`): The longest answer.
        temperature (`float`): 0 for the likeliest words.
    """

    seed: int = 0
    max_new_tokens: int = 120
    temperature: float = 0.0


@dataclass(frozen=True)
class Rows:
    """All answers so far.

    Args:
        texts (`list[str]`): One per row.
        tokens (`int`): How many tokens the longest of them has.
        done (`bool`): Whether this is all.
        note (`str`): A sentence, if they ended before their end.
    """

    texts: list[str]
    tokens: int
    done: bool = False
    note: str = ""


class SharedNoise(LogitsProcessor):
    """Samples with the same random numbers in every row, as a choice that greedy decoding then makes.

    The token with the largest `log p + g` is drawn with probability p, if g are independent Gumbel numbers (the Gumbel
    trick). They are the same for all rows, so rows part only where their probabilities do.

    Args:
        temperature (`float`): Above 0.
        seed (`int`): Where the numbers come from.
    """

    def __init__(self, temperature: float, seed: int) -> None:
        self.temperature = temperature
        # On the CPU, so that a seed means the same everywhere.
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        uniform = torch.rand(scores.shape[-1], generator=self.generator)
        gumbel = -torch.log(-torch.log(uniform)).to(scores.device)
        likely, ids = torch.log_softmax(scores.float() / self.temperature, -1).topk(min(_AMONG, scores.shape[-1]))
        before = likely.exp().cumsum(-1) - likely.exp()
        # (the likeliest is always kept)
        drawn = (likely + gumbel[ids]).masked_fill(before >= _TOP_P, -torch.inf).argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, ids.gather(-1, drawn), 0.0)


class RowStreamer(BaseStreamer):
    """Takes the tokens of all rows as `generate` makes them, and tells the texts.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        rows (`int`): How many rows.
        ends (`Sequence[int]`): The tokens that end a row.
        stop (`str`, *optional*): A text that ends a row; it is not shown.
        tell (`Callable[[Rows], None]`): Takes the texts after every token.
    """

    def __init__(
        self, tokenizer: Any, rows: int, ends: Sequence[int], stop: str | None, tell: Callable[[Rows], None]
    ) -> None:
        self.tokenizer, self.ends, self.stop, self.tell = tokenizer, frozenset(ends), stop, tell
        self.ids: list[list[int]] = [[] for _ in range(rows)]
        self.over = [False] * rows
        self.tokens = 0
        self._prompt_passed = False

    def put(self, value: Any) -> None:
        # The prompt comes first, as one tensor.
        if not self._prompt_passed:
            self._prompt_passed = True
            return
        self.tokens += 1
        for row, token in enumerate(value.tolist()):
            if self.over[row]:
                continue
            if token in self.ends:
                self.over[row] = True
                continue
            self.ids[row].append(token)
            if self.stop is not None and self.stop in self._decoded(row):
                self.over[row] = True
        self.tell(Rows(self.texts(), self.tokens))

    def end(self) -> None:
        """Called by `generate`; whoever called that knows it too."""

    def texts(self, last: bool = False) -> list[str]:
        """The texts of all rows, without what is not sure yet unless these are the last."""
        return [shown(self._decoded(row), self.stop, last or over).strip() for row, over in enumerate(self.over)]

    def _decoded(self, row: int) -> str:
        return str(self.tokenizer.decode(self.ids[row], skip_special_tokens=True))


def shown(text: str, stop: str | None, last: bool) -> str:
    """What of a growing text may be shown: not half a character, and not what may become the stop text.

    Example:

    ```py
    >>> from neva_hf.space.rows import shown
    >>> shown("All is well.\\nQues", "\\nQuestion:", last=False)
    'All is well.'
    ```
    """
    if stop is not None:
        text, found, _ = text.partition(stop)
        if not found and not last:
            sizes = range(min(len(text), len(stop) - 1), 0, -1)
            size = next((size for size in sizes if text.endswith(stop[:size])), 0)
            text = text[: len(text) - size]
    return text if last else text.rstrip("\ufffd")


class _Stop(StoppingCriteria):
    """Ends rows that have met the stop text, and all when nobody reads any more or time is up."""

    def __init__(self, streamer: RowStreamer, gone: threading.Event, until: float) -> None:
        self.streamer, self.gone, self.until = streamer, gone, until
        self.late = False

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.late = self.late or time.monotonic() > self.until
        every = self.late or self.gone.is_set()
        return torch.tensor([every or over for over in self.streamer.over], device=input_ids.device)


def generate_rows(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    strengths: Sequence[Strengths],
    sampling: Sampling,
    *,
    gate: bool,
    seconds: float,
    tell: Callable[[Rows], None],
    gone: threading.Event,
) -> Rows:
    """Makes one answer per prompt, and tells them while they grow.

    Args:
        model ([`NeVAModel`]): The model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        prompts (`Sequence[Sequence[int]]`): Token ids, one list per row.
        strengths (`Sequence[Strengths]`): The dials of each row.
        sampling ([`Sampling`]): How answers are made.
        gate (`bool`): Whether gates are used where the map has them.
        seconds (`float`): How long it may take.
        tell (`Callable[[Rows], None]`): Takes the texts after every token.
        gone (`threading.Event`): Set when nobody wants the answers any more.

    Returns:
        [`Rows`]: The finished answers.
    """
    pad = tokenizer.pad_token_id or 0
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    told_ends = getattr(model.generation_config, "eos_token_id", None)
    ends = told_ends if isinstance(told_ends, list) else [] if told_ends is None else [told_ends]
    # Without a chat template nothing but text ends an answer.
    stop = None if getattr(tokenizer, "chat_template", None) else NEXT_QUESTION
    streamer = RowStreamer(tokenizer, len(prompts), ends, stop, tell)
    criteria = _Stop(streamer, gone, time.monotonic() + seconds)
    noise = [SharedNoise(sampling.temperature, sampling.seed)] if sampling.temperature > 0 else []
    model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        strengths=list(strengths),
        gate=gate,
        max_new_tokens=sampling.max_new_tokens,
        pad_token_id=pad,
        streamer=streamer,
        stopping_criteria=StoppingCriteriaList([criteria]),
        logits_processor=LogitsProcessorList(noise),
        # A model's own generation config may ask for other ways.
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        num_beams=1,
    )
    note = ""
    if criteria.late:
        note = f"Stopped after {seconds:g} seconds."
    elif not all(streamer.over) and not gone.is_set():
        note = f"Cut at {sampling.max_new_tokens} tokens."
    return Rows(streamer.texts(last=True), streamer.tokens, True, note)


def read_rows(
    worker: Worker, limits: Limits, work: Callable[[Callable[[Rows], None], threading.Event], Rows]
) -> Generator[Rows, None, None]:
    """Runs work in its turn, and gives what it tells. A reader who is slower than the model gets the newest only.

    Args:
        worker ([`Worker`]): Where it runs.
        limits ([`Limits`]): How long to wait.
        work (`Callable`): Takes where to tell, and an event that says that nobody reads any more; returns the last rows.

    Returns:
        `Generator[Rows]`: Closing it stops the work.

    Raises:
        `NeVAError`: For whatever goes wrong, in a sentence that holds nothing of what was asked or answered.
    """
    told: queue.SimpleQueue[Rows | BaseException] = queue.SimpleQueue()
    gone = threading.Event()

    def job() -> None:
        try:
            if not gone.is_set():
                told.put(work(told.put, gone))
        except BaseException as error:
            told.put(error)

    future = worker.submit(job)
    try:
        while True:
            try:
                found = told.get(timeout=limits.wait_seconds)
                while not told.empty():
                    found = told.get_nowait()
            except queue.Empty:
                raise NeVAError("The model is busy: it did not get to this question. Try again later.") from None
            if isinstance(found, BaseException):
                raise _explained(found) from None
            yield found
            if found.done:
                return
    finally:
        gone.set()
        future.cancel()


def _explained(error: BaseException) -> NeVAError:
    if isinstance(error, NeVAError):
        return error
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return NeVAError("The model ran out of memory. Ask for less: a shorter conversation or answer.")
    # Not the message, which may hold what a visitor wrote.
    where = traceback.extract_tb(error.__traceback__)[-1:]
    place = f"{where[0].filename}:{where[0].lineno}" if where else "?"
    logger.error("The model failed with %s at %s.", type(error).__name__, place)
    return NeVAError(f"The model failed with {type(error).__name__}. Try again, with other dials or another question.")
