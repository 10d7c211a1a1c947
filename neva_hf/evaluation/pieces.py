"""The pieces of work of an evaluation: what each is called, what it costs, how it is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from neva_hf.baselines.method import Dials

from . import dose as doses
from .candidate import Candidate, Extra
from .kept import Kept, Piece, fingerprint
from .request import Request
from .steered import MAX_TOKENS, mapping_of, steered_damage, steered_log_probs


@dataclass
class Pieces:
    """Makes the pieces of one request; the name of a piece says all that it depends on within one run.

    Args:
        request ([`Request`]): What is asked for.
        model (`nn.Module`): The model that all methods steer.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        kept ([`Kept`]): Where findings are, for measurements that need those of others.
    """

    request: Request
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    kept: Kept

    def all(self) -> list[Piece]:
        """Everything that is asked for, in order; costs are about the tokens that the model runs."""
        asked = self.request
        found = [self.replies(None, {})]
        for candidate in asked.candidates:
            found.append(self.about(candidate))
            for strength in asked.strengths:
                found.append(self.damage(candidate, strength))
                found += [self.replies(candidate, {value: strength}) for value in asked.values]
        first, strength = asked.candidates[0], asked.strengths[0]
        found += [self.replies(first, {one: strength, two: strength}, few=True) for one, two in asked.pairs]
        if asked.opposing is not None:
            for value in asked.values:
                prompt = asked.opposing(value, strength)
                found += [
                    self.replies(one, dials, prompt, few=True)
                    for one, dials in ((None, {}), (first, {value: strength}))
                ]
        if isinstance(asked.dose, list):
            for strength in asked.dose:
                found.append(self.damage(first, strength, few=True))
                found += [self.replies(first, {value: strength}, few=True) for value in asked.values]
        for extra in asked.extras:
            found += [self.extra(extra, candidate) for candidate in (None, *asked.candidates)]
        # (two values may share an opposing prompt)
        return list({piece.name: piece for piece in found}.values())

    def replies(
        self, candidate: Candidate | None, dials: Dials, prompt: str | None = None, *, few: bool = False
    ) -> Piece:
        """Log-probabilities of all replies: of the base model without a candidate, of the first few scenarios with `few`.

        Where all scenarios are measured anyway, their piece is given also for few of them.
        """
        strength = next(iter(dials.values()), None)
        few = few and (prompt is not None or len(dials) > 1 or strength not in (None, *self.request.strengths))
        scenarios = self.request.scenarios[: self.request.few] if few else self.request.scenarios

        def compute() -> list[dict[str, float]]:
            method = None if candidate is None else candidate.method()
            return steered_log_probs(self.model, self.tokenizer, scenarios, method, dials, system=prompt)

        characters = sum(len(one.question) + sum(map(len, one.replies.values())) for one in scenarios)
        words = ["replies", mapping_of(dials), f"behind {prompt!r}" if prompt else "", "few" if few else ""]
        return self._piece(candidate, words, characters / 4 + 30 * len(scenarios), compute)

    def damage(self, candidate: Candidate, strength: float, *, few: bool = False) -> Piece:
        """What every value costs at a strength, on neutral text."""
        texts = self.request.texts[: doses.TEXTS] if few else self.request.texts
        settings: list[Dials] = [{value: strength} for value in self.request.values]

        def compute() -> dict[str, Any]:
            return steered_damage(self.model, self.tokenizer, texts, candidate.method(), settings)

        cost = (len(settings) + 1) * sum(min(len(text) / 4.5, MAX_TOKENS) for text in texts)
        return self._piece(candidate, ["neutral text", f"{strength:+g}", "few" if few else ""], cost, compute)

    def about(self, candidate: Candidate) -> Piece:
        """What the method says about itself."""

        def compute() -> dict[str, Any]:
            method = candidate.method()
            return {"scalable": method.scalable, "notes": method.notes}

        return self._piece(candidate, ["about"], 1.0, compute)

    def extra(self, extra: Extra, candidate: Candidate | None) -> Piece:
        """A further measurement, of a method or of the base model."""
        asked = self.request
        settings = extra.settings
        if settings is None:
            settings = [{value: strength} for strength in asked.strengths for value in asked.values]
        if candidate is None:
            settings = [{}]

        earlier = next((other for other in asked.extras if other.name == extra.after), None)

        def compute() -> Any:
            found = None if earlier is None else self._found(self.extra(earlier, candidate))
            return extra.run(None if candidate is None else candidate.method(), settings, found)

        words = [extra.name, fingerprint([extra.key, settings, None if earlier is None else earlier.key])]
        return self._piece(candidate, words, extra.cost * len(settings), compute)

    def _found(self, piece: Piece) -> Any:
        """What a piece gives, which may be the work of another process."""
        if piece.name not in self.kept:
            self.kept.refresh()
        if piece.name not in self.kept:
            self.kept.put(piece.name, piece.compute())
        return self.kept[piece.name]

    def _piece(
        self, candidate: Candidate | None, words: Sequence[str], cost: float, compute: Callable[[], Any]
    ) -> Piece:
        said = " ".join(word for word in words if word)
        who, key = ("base model", "") if candidate is None else (candidate.name, f" {candidate.key}")
        return Piece(
            f"{who}{key}/{said}", cost, compute, "" if candidate is None else candidate.name, f"{who}: {said}"
        )
