"""Answers that a model generates under dials: greedy or sampled, the same for the same seed, whatever shares a batch.

Prompts of one length make a batch, so nothing is padded; each row has dials of its own. Sampling adds Gumbel noise that
depends on the seed, the question and the position alone: the answers of all methods and dials to a question share their
luck, so differences between them are the dials'.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from neva_hf.baselines.hooks import neutral
from neva_hf.baselines.method import Dials, Method
from neva_hf.errors import NeVAError
from neva_hf.measure import Progress, no_progress
from neva_hf.prompts import format_prompt
from neva_hf.talk import NEXT_QUESTION

from .steered import system_prompt


@dataclass(frozen=True)
class Sampling:
    """How answers are made.

    Args:
        max_new_tokens (`int`): The longest answer, in tokens.
        temperature (`float`): 0 for the likeliest token at every step (greedy), above 0 to sample.
        top_p (`float`): Sampling is from the likeliest tokens that hold so much of the probability.
        seed (`int`): Of the noise.
        system (`str`, *optional*): A system prompt, in front of the one of the method.
    """

    max_new_tokens: int = 160
    temperature: float = 0.0
    top_p: float = 0.95
    seed: int = 0
    system: str | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not self.temperature >= 0 or not 0 < self.top_p <= 1:
            raise NeVAError(
                "`max_new_tokens` must be at least 1, `temperature` at least 0 and `top_p` above 0 and at most 1, got "
                f"{self.max_new_tokens}, {self.temperature} and {self.top_p}."
            )


GREEDY = Sampling()


@dataclass(frozen=True)
class Answer:
    """One generated answer.

    Args:
        question (`str`): What was asked.
        dials (`Mapping[str, float]`): What was in force.
        text (`str`): The answer.
        tokens (`list[int]`): Its tokens, without the end token.
        ended (`bool`): Whether it ended by itself, before `max_new_tokens`.
    """

    question: str
    dials: Mapping[str, float]
    text: str
    tokens: list[int]
    ended: bool

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "dials": dict(self.dials)}


def generate_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    settings: Sequence[Dials],
    method: Method | None = None,
    *,
    sampling: Sampling = GREEDY,
    rows: int = 16,
    progress: Progress[list[tuple[int, int]]] = no_progress,
) -> list[list[Answer]]:
    """Answers to questions under several settings of the dials.

    Args:
        model (`nn.Module`): The model that the method steers, with a `generate` of transformers.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        questions (`Sequence[str]`): The questions.
        settings (`Sequence[Mapping[str, float]]`): Value -> strength; `{}` is the model as it is.
        method ([`Method`], *optional*): What steers; without it all settings must be empty.
        sampling ([`Sampling`]): How answers are made.
        rows (`int`): At most so many answers are made together.
        progress ([`Progress`]): Shows how far it is.

    Returns:
        `list[list[Answer]]`: For each setting, an answer to each question.

    Raises:
        `NeVAError`: If there are dials but no method, or a prompt is empty.
    """
    if method is None and any(settings):
        raise NeVAError("Dials need a method to put them in force: pass `method`, or only empty settings.")
    prompts = {}
    for number, question in enumerate(questions):
        for place, dials in enumerate(settings):
            text = format_prompt(tokenizer, question, system=system_prompt(method, dials, sampling.system))
            prompts[number, place] = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    found: dict[tuple[int, int], Answer] = {}
    with torch.inference_mode(), neutral(model):
        for batch in progress(_batches(prompts, rows), "answers"):
            rows_dials = [settings[place] for _, place in batch]
            ids = torch.tensor([prompts[one] for one in batch], device=next(model.parameters()).device)
            made = _generate(model, tokenizer, ids, rows_dials, [number for number, _ in batch], method, sampling)
            for one, row in zip(batch, made, strict=True):
                tokens, ended = _until_end(row, _ends(model, tokenizer), sampling.max_new_tokens)
                text = tokenizer.decode(tokens, skip_special_tokens=True)
                if _is_plain(tokenizer) and NEXT_QUESTION in text:
                    text, ended = text.partition(NEXT_QUESTION)[0], True
                    tokens = list(tokenizer(text, add_special_tokens=False)["input_ids"])
                found[one] = Answer(questions[one[0]], dict(settings[one[1]]), text.strip(), tokens, ended)
    return [[found[number, place] for number in range(len(questions))] for place in range(len(settings))]


def _batches(prompts: Mapping[tuple[int, int], list[int]], rows: int) -> list[list[tuple[int, int]]]:
    lengths: dict[int, list[tuple[int, int]]] = {}
    for one, prompt in prompts.items():
        lengths.setdefault(len(prompt), []).append(one)
    return [group[at : at + rows] for group in lengths.values() for at in range(0, len(group), rows)]


def _generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    dials: Sequence[Dials],
    numbers: Sequence[int],
    method: Method | None,
    sampling: Sampling,
) -> list[list[int]]:
    """The new tokens of each row, the end token and what follows it included."""
    # A model's own generation config may ask for sampling: what is sampled here is chosen by the noise.
    options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling.temperature > 0:
        options["logits_processor"] = LogitsProcessorList([_Noise(sampling, numbers, ids.shape[1])])
    if _is_plain(tokenizer):
        options |= {"stop_strings": [NEXT_QUESTION], "tokenizer": tokenizer}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    generate: Any = model.generate
    same = all(one == dials[0] for one in dials)

    def run() -> torch.Tensor:
        return generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=pad,
            **options,
        )

    if method is None:
        output = run()
    else:
        with method.at([dials[0]] if same else list(dials)):
            output = run()
    return output[:, ids.shape[1] :].tolist()


class _Noise(LogitsProcessor):
    """Makes the likeliest token a sampled one: the maximum of log p + Gumbel noise is distributed as p."""

    def __init__(self, sampling: Sampling, numbers: Sequence[int], prompt: int) -> None:
        self.sampling, self.numbers, self.prompt = sampling, list(numbers), prompt

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scaled = scores.float() / self.sampling.temperature
        ordered, order = scaled.sort(descending=True, dim=-1)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        # (the likeliest token always stays)
        beyond = before >= self.sampling.top_p
        dropped = beyond.scatter(1, order, beyond)
        step = input_ids.shape[1] - self.prompt
        noise = {number: self._gumbel(number, step, scores.shape[1]) for number in set(self.numbers)}
        added = torch.stack([noise[number] for number in self.numbers]).to(scaled)
        return (scaled + added).masked_fill(dropped, -float("inf"))  # type: ignore[return-value]

    def _gumbel(self, number: int, step: int, size: int) -> torch.Tensor:
        # Made on the CPU, so that every device samples alike.
        digest = hashlib.sha256(f"{self.sampling.seed},{number},{step}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        uniform = torch.rand(size, generator=generator, dtype=torch.float64).clamp(1e-300, 1 - 1e-16)
        return -(-uniform.log()).log().float()


def _ends(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    config: Any = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    return {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}


def _until_end(row: Sequence[int], ends: set[int], limit: int) -> tuple[list[int], bool]:
    for place, token in enumerate(row):
        if token in ends:
            return list(row[:place]), True
    return list(row), len(row) < limit


def _is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    return not getattr(tokenizer, "chat_template", None)
