"""Whether an export says what the live model says: every logit of a few prompts, compared.

Invariants:
- What is compared is what was written, loaded again by the program that will load it (or, for llama.cpp, its
  arithmetic on the numbers read back).
- An export that is off is refused, with the number; so is one whose edit drowns in rounding, since a lost edit would
  pass unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from neva_hf.dial import dialled
from neva_hf.errors import NeVAError
from neva_hf.prompts import format_prompt
from neva_hf.strengths import Strengths

from .fixed import base_model, warned_already

CHECK_PROMPTS = (
    "What makes a life well lived?",
    "My friend asks me to lend her the money that I saved for a journey. What should I do?",
    "Write two sentences about the sea.",
    "What is 17 times 3?",
)
"""The questions on which exports are compared, in the model's own chat format."""

# The largest difference between logits that is put down to rounding, by what the model computes in. (In bfloat16 an
# addition that is rounded once more moved logits of SmolLM2-135M by 1.7, in float32 by 0.00007.)
TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.5, torch.bfloat16: 4.0}
# Beyond this part of what the edit itself does to logits, an export is not called the same.
MAX_PART = 0.25


@dataclass(frozen=True)
class Check:
    """How near an export comes to the live model.

    Args:
        difference (`float`): The largest absolute difference of a logit, export against live model.
        effect (`float`): The largest absolute difference of a logit, live model against base model.
        tolerance (`float`): What `difference` may be at most.
        tokens (`int`): At how many tokens all logits were compared.
    """

    difference: float
    effect: float
    tolerance: float
    tokens: int


@dataclass(frozen=True, eq=False)
class Reference:
    """What the live model says to some prompts at fixed strengths; exports are held against it.

    Args:
        prompts (`list[torch.Tensor]`): Token ids, int64 `[1, tokens]` each.
        logits (`list[torch.Tensor]`): The live model's, float32 `[tokens, vocabulary]` on the CPU.
        effect (`float`): The largest absolute difference between them and the base model's.
        tolerance (`float`): The largest difference that an export may have.
        dtype (`torch.dtype`): What the model computes in.
    """

    prompts: list[torch.Tensor]
    logits: list[torch.Tensor]
    effect: float
    tolerance: float
    dtype: torch.dtype

    def check(self, run: Callable[[torch.Tensor], Any], what: str, otherwise: str) -> Check:
        """Compares an export with the live model.

        Args:
            run (`Callable`): Runs the export: token ids `[1, tokens]` -> an output with `logits`.
            what (`str`): What the export is, for the message, such as `"The merged model"`.
            otherwise (`str`): What to do if it is off, a sentence for the message.

        Returns:
            [`Check`]: The numbers.

        Raises:
            `NeVAError`: If a logit differs by more than the tolerance; the message says by how much.
        """
        difference = 0.0
        for ids, expected in zip(self.prompts, self.logits, strict=True):
            difference = _larger(difference, _largest(_logits(run, ids), expected))
        # (Written so that numbers that are no numbers are refused as well.)
        if not difference <= self.tolerance:
            rounded = (
                f"In {str(self.dtype).removeprefix('torch.')} rounding alone may do that: load the base model in float32 "
                "(dtype='float32', --dtype float32) and export again. If it stays: "
            )
            raise NeVAError(
                f"{what} does not say what the live model says: a logit differs by {difference:.3g}, allowed is "
                f"{self.tolerance:.3g} (the edit itself moves logits by up to {self.effect:.3g}). Nothing was written. "
                f"{rounded if self.dtype.itemsize < 4 else ''}{otherwise}"
            )
        return Check(difference, self.effect, self.tolerance, sum(ids.shape[1] for ids in self.prompts))


def reference(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    strengths: Strengths,
    prompts: Sequence[str] | None = None,
    tolerance: float | None = None,
) -> Reference:
    """Asks the live model.

    Args:
        model (`nn.Module`): A model with NeVA layers.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Its tokenizer; `model.tokenizer` when `None`.
        strengths (`dict[str, float]`): Value -> strength.
        prompts (`Sequence[str]`, *optional*): Questions; `CHECK_PROMPTS` when `None`.
        tolerance (`float`, *optional*): The largest difference of a logit. `None` is what rounding explains in the
            model's dtype (0.001 in float32), and at most a quarter of the edit's own effect.

    Returns:
        [`Reference`]: Its logits.

    Raises:
        `NeVAError`: Without a tokenizer or prompts, or if the live model's logits are not finite.
    """
    tokenizer = find_tokenizer(model, tokenizer)
    questions = list(CHECK_PROMPTS if prompts is None else prompts)
    if not questions or not all(isinstance(question, str) and question for question in questions):
        raise NeVAError("`prompts` must hold at least one text to compare the export with the live model on.")
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise NeVAError(f"`tolerance` must be a number of at least 0, in units of logits, got {tolerance!r:.40}.")
    texts = [format_prompt(tokenizer, question) for question in questions]
    ids = [tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids for text in texts]
    device = base_model(model).get_input_embeddings().weight.device
    ids = [one.to(device) for one in ids]
    training = model.training
    model.eval()
    try:
        with warned_already(), dialled(model, strengths):
            logits = [_logits(model, one) for one in ids]
        with dialled(model, {}):
            effect = 0.0
            for one, edited in zip(ids, logits, strict=True):
                effect = _larger(effect, _largest(_logits(model, one), edited))
    finally:
        model.train(training)
    if not all(bool(torch.isfinite(one).all()) for one in logits):
        raise NeVAError("At these strengths the live model's logits are not finite. Use smaller ones.")
    dtype = base_model(model).dtype
    if tolerance is None:
        tolerance = min(TOLERANCES.get(dtype, max(TOLERANCES.values())), MAX_PART * effect)
    return Reference(ids, logits, effect, tolerance, dtype)


def find_tokenizer(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """The tokenizer that was given, or the one that the model was loaded with.

    Raises:
        `NeVAError`: If there is none.
    """
    found = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    if found is None:
        raise NeVAError(
            "An export is compared with the live model on real prompts, which takes the tokenizer: pass tokenizer=..."
        )
    return found


@torch.inference_mode()
def _logits(run: Callable[[torch.Tensor], Any], ids: torch.Tensor) -> torch.Tensor:
    return run(ids).logits[0].float().cpu()


def _largest(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def _larger(one: float, other: float) -> float:
    # `max` would lose what is no number.
    return other if other != other else max(one, other)
