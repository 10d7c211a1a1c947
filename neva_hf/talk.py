"""Answers of a model at several settings of its dials, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase, TextStreamer

from .model import NeVAModel
from .prompts import format_prompt
from .strengths import RowStrengths, Strengths

NEXT_QUESTION = "\nQuestion:"
"""What a model without a chat template writes when it goes on with the conversation by itself; answers end before it."""


@dataclass(frozen=True)
class AnswerOptions:
    """How answers are made.

    Args:
        max_new_tokens (`int`): The longest answer, in tokens.
        temperature (`float`): 0 for the likeliest words (greedy), above 0 to sample.
        seed (`int`): For sampling.
        system (`str`, *optional*): A system prompt.
    """

    max_new_tokens: int = 200
    temperature: float = 0.0
    seed: int = 0
    system: str | None = None


DEFAULT_OPTIONS = AnswerOptions()


def answers(
    model: NeVAModel,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    strengths: Sequence[Strengths],
    *,
    history: Sequence[tuple[str, str]] = (),
    options: AnswerOptions = DEFAULT_OPTIONS,
) -> list[str]:
    """One answer for each setting of the dials, made together as rows of one batch.

    Args:
        model ([`NeVAModel`]): The model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        question (`str`): What a user asks.
        strengths (`Sequence[Strengths]`): The settings; `{}` is the base model.
        history (`Sequence[tuple[str, str]]`): Earlier questions and answers.
        options ([`AnswerOptions`]): How answers are made.

    Returns:
        `list[str]`: The answers.
    """
    prompt = format_prompt(tokenizer, question, system=options.system, history=history)
    inputs = tokenizer([prompt] * len(strengths), return_tensors="pt", add_special_tokens=False)
    output = _generate(model, tokenizer, inputs, list(strengths), options)
    made = output[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(made, skip_special_tokens=True)
    return [(text.partition(NEXT_QUESTION)[0] if _is_plain(tokenizer) else text).strip() for text in texts]


def stream_answer(
    model: NeVAModel,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    strengths: Strengths,
    write: Callable[[str], None],
    *,
    history: Sequence[tuple[str, str]] = (),
    options: AnswerOptions = DEFAULT_OPTIONS,
) -> str:
    """One answer, written piece by piece as it is made.

    Args:
        model ([`NeVAModel`]): The model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        question (`str`): What a user asks.
        strengths (`Strengths`): The setting of the dials.
        write (`Callable[[str], None]`): Takes each piece of text.
        history (`Sequence[tuple[str, str]]`): Earlier questions and answers.
        options ([`AnswerOptions`]): How the answer is made.

    Returns:
        `str`: The whole answer.
    """
    shown = ShownText(write, NEXT_QUESTION if _is_plain(tokenizer) else None)

    class _Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            shown.add(text, last=stream_end)

    prompt = format_prompt(tokenizer, question, system=options.system, history=history)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    streamer = _Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    _generate(model, tokenizer, inputs, strengths, options, streamer=streamer)
    return shown.text.strip()


class ShownText:
    """Writes a text that comes in pieces, up to a stop string.

    What may be the beginning of the stop string is held back until it is known.

    Args:
        write (`Callable[[str], None]`): Takes each piece that is sure to be shown.
        stop (`str`, *optional*): Where the text ends; it is not shown itself.
    """

    def __init__(self, write: Callable[[str], None], stop: str | None) -> None:
        self.write, self.stop = write, stop
        self.text = ""
        self._held = ""
        self._over = False

    def add(self, piece: str, *, last: bool = False) -> None:
        """Takes the next piece; `last` when no other follows."""
        if self._over:
            return
        sure, held = self._held + piece, ""
        if self.stop is not None:
            sure, found, _ = sure.partition(self.stop)
            self._over = bool(found)
            if not found and not last:
                sizes = range(min(len(sure), len(self.stop) - 1), 0, -1)
                size = next((size for size in sizes if sure.endswith(self.stop[:size])), 0)
                sure, held = sure[: len(sure) - size], sure[len(sure) - size :]
        self._held = held
        if sure:
            self.text += sure
            self.write(sure)


def _generate(
    model: NeVAModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: BatchEncoding,
    strengths: RowStrengths,
    options: AnswerOptions,
    **more: Any,
) -> torch.Tensor:
    if _is_plain(tokenizer):
        more |= {"stop_strings": [NEXT_QUESTION], "tokenizer": tokenizer}
    if options.temperature > 0:
        more |= {"do_sample": True, "temperature": options.temperature, "top_p": 0.95}
    else:
        # A model's own generation config may ask for sampling.
        more |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        return model.generate(
            **inputs.to(model.device),
            strengths=strengths,
            max_new_tokens=options.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            **more,
        )


def _is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether prompts are plain text, for lack of a chat template: then nothing but text ends an answer."""
    return not getattr(tokenizer, "chat_template", None)
