"""Answers of a model at several settings of its dials, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from .model import NeVAModel
from .prompts import format_prompt
from .strengths import Strengths


def answers(
    model: NeVAModel,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    strengths: Sequence[Strengths],
    *,
    system: str | None = None,
    history: Sequence[tuple[str, str]] = (),
    max_new_tokens: int = 60,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """One answer for each setting of the dials, made together as rows of one batch.

    Args:
        model ([`NeVAModel`]): The model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        question (`str`): What a user asks.
        strengths (`Sequence[Strengths]`): The settings; `{}` is the base model.
        system (`str`, *optional*): A system prompt.
        history (`Sequence[tuple[str, str]]`): Earlier questions and answers.
        max_new_tokens (`int`): The longest answer, in tokens.
        temperature (`float`): 0 for the likeliest words (greedy), above 0 to sample.
        seed (`int`): For sampling.

    Returns:
        `list[str]`: The answers.
    """
    prompt = format_prompt(tokenizer, question, system=system, history=history)
    inputs = tokenizer([prompt] * len(strengths), return_tensors="pt", add_special_tokens=False).to(model.device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        output = model.generate(
            **inputs,
            strengths=list(strengths),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            **_sampling(temperature),
        )
    made = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(made, skip_special_tokens=True)]


def stream_answer(
    model: NeVAModel,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    strengths: Strengths,
    write: Callable[[str], None],
    *,
    system: str | None = None,
    history: Sequence[tuple[str, str]] = (),
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """One answer, written piece by piece as it is made.

    Args:
        model ([`NeVAModel`]): The model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        question (`str`): What a user asks.
        strengths (`Strengths`): The setting of the dials.
        write (`Callable[[str], None]`): Takes each piece of text.
        system (`str`, *optional*): A system prompt.
        history (`Sequence[tuple[str, str]]`): Earlier questions and answers.
        max_new_tokens (`int`): The longest answer, in tokens.
        temperature (`float`): 0 for the likeliest words (greedy), above 0 to sample.
        seed (`int`): For sampling.

    Returns:
        `str`: The whole answer.
    """
    pieces: list[str] = []

    class _Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append(text)
            write(text)

    prompt = format_prompt(tokenizer, question, system=system, history=history)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.generate(
            **inputs,
            strengths=strengths,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            streamer=_Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **_sampling(temperature),
        )
    return "".join(pieces).strip()


def _sampling(temperature: float) -> dict[str, object]:
    if temperature > 0:
        return {"do_sample": True, "temperature": temperature, "top_p": 0.95}
    # A model's own generation config may ask for sampling.
    return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
