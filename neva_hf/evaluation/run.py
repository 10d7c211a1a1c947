"""A whole evaluation: pieces of work that are kept as they finish, and the report that is made from them.

Invariant: the report is a function of the kept pieces, the scenarios' keys, the value system and the seed. So an
interrupted run that goes on ends with the report of one that was not, bit for bit, and so do several processes that share
the pieces (with the same number of threads each: sums over other numbers of threads differ in their last bits).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from neva_hf.baselines.method import Method
from neva_hf.errors import NeVAError
from neva_hf.scenarios import Scenario, load_neutral_texts, scenarios_hash
from neva_hf.values import ValueSystem

from .assembly import Assembly
from .candidate import Candidate, Extra
from .kept import Kept, adapters_fingerprint, fingerprint, model_fingerprint, share_out, work_off
from .pieces import Pieces
from .request import Request
from .tables import DRAWS
from .together import Opposing, chosen_pairs, opposing_prompt

NEUTRAL_TEXTS = 16
"""Held-out neutral texts that damage is measured on, unless others are given."""


def silent(line: str) -> None:
    """Says nothing."""


def evaluate(
    methods: Sequence[Method | Candidate],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    scenarios: Sequence[Scenario],
    *,
    values: Sequence[str] | None = None,
    strengths: Sequence[float] = (1.0, -1.0),
    neutral_texts: Sequence[str] | None = None,
    pairs: int | Sequence[tuple[str, str]] = 0,
    opposing: bool | Opposing = False,
    dose: Sequence[float] | Mapping[str, Any] | None = None,
    few: int = 6,
    extras: Sequence[Extra] = (),
    system: ValueSystem | None = None,
    about: Mapping[str, Any] | None = None,
    limit: int | None = None,
    samples: int = DRAWS,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    tell: Callable[[str], None] = silent,
) -> dict[str, Any]:
    """Measures control, leakage and damage of methods on the same scenarios and texts.

    The first method is the one that the report is about: pairs of values, opposing prompts and dose curves are measured of
    it alone, and the others are compared with it.

    Args:
        methods (`Sequence[Method]`): What steers, each calibrated to the same KL divergence (`+1` and `-1`).
        model (`nn.Module`): The model that all of them steer.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        scenarios (`Sequence[Scenario]`): Scenarios that no method was fitted on.
        values (`Sequence[str]`, *optional*): The values to dial; all of the first method when `None`.
        strengths (`Sequence[float]`): At which strengths; pairs and opposing prompts are measured at the first.
        neutral_texts (`Sequence[str]`, *optional*): For damage; some shipped held-out ones when `None`.
        pairs (`int` or `Sequence[tuple[str, str]]`): Values that are dialled together, or how many pairs to draw.
        opposing (`bool` or `Callable[[str, float], str]`):
            Whether to measure dials under system prompts that push the other way; a function gives their words.
        dose (`Sequence[float]` or `Mapping`, *optional*):
            Strengths to measure dose curves at, or a map's own curves (`config.measurements["dose"]`) to report.
        few (`int`): How many scenarios, from the front, pairs, opposing prompts and dose curves are measured on.
        extras (`Sequence[Extra]`): What else is measured of every method.
        system ([`ValueSystem`], *optional*): Groups and circle for NGLR and neighbours.
        about (`Mapping[str, Any]`, *optional*): What the report repeats, such as the name of the map.
        limit (`int`, *optional*): At most so many scenarios, from the front.
        samples (`int`): Bootstrap samples.
        seed (`int`): For bootstrap and drawn pairs.
        checkpoint (`str` or `os.PathLike`, *optional*): A folder that keeps finished pieces: an interrupted run goes on.
        tell (`Callable[[str], None]`): Gets a line before every piece, with the time that is left.

    Returns:
        `dict[str, Any]`: The report, plain data; report.py says what is in it and writes it.

    Raises:
        `NeVAError`: If the request cannot be fulfilled, such as for a value that the scenarios do not contrast.

    Example:

    ```py
    >>> from neva_hf import NeVAModel, load_scenarios
    >>> from neva_hf.baselines import from_model
    >>> from neva_hf.evaluation import evaluate, write_report
    >>> model = NeVAModel.from_pretrained("user/neva-...")  # doctest: +SKIP
    >>> found = evaluate([from_model(model)], model, model.tokenizer, load_scenarios(split="test"))  # doctest: +SKIP
    >>> write_report(found, "report")  # doctest: +SKIP
    ```
    """
    run = Run.of(
        methods, model, tokenizer, scenarios, values=values, strengths=strengths, neutral_texts=neutral_texts,
        pairs=pairs, opposing=opposing, dose=dose, few=few, extras=extras, system=system, about=about, limit=limit,
        samples=samples, seed=seed, checkpoint=checkpoint, tell=tell,
    )  # fmt: skip
    run.work()
    return run.report()


class Run:
    """One evaluation that can be worked off by several processes.

    Args:
        request ([`Request`]): What is asked for.
        model (`nn.Module`): The model that all methods steer.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        checkpoint (`str` or `os.PathLike`, *optional*): The folder of finished pieces.
        part (`int`): The number of this process, from 0.
        tell (`Callable[[str], None]`): Gets a line before every piece.
    """

    def __init__(
        self,
        request: Request,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        part: int = 0,
        tell: Callable[[str], None] = silent,
    ) -> None:
        self.request, self.model, self.part, self.tell = request, model, part, tell
        self.fingerprint = model_fingerprint(model)
        key = {
            "model": self.fingerprint,
            # (a map that is put on the model later is told by its candidate)
            "adapters": adapters_fingerprint(model),
            "scenarios": scenarios_hash(request.scenarios),
            "few": request.few,
            "texts": fingerprint(request.texts),
            "values": request.values,
            "template": getattr(tokenizer, "chat_template", None),
        }
        self.kept = Kept(None if checkpoint is None else Path(checkpoint), "evaluate", key, str(part))
        self.pieces = Pieces(request, model, tokenizer, self.kept)

    @classmethod
    def of(
        cls,
        methods: Sequence[Method | Candidate],
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        scenarios: Sequence[Scenario],
        *,
        values: Sequence[str] | None = None,
        neutral_texts: Sequence[str] | None = None,
        pairs: int | Sequence[tuple[str, str]] = 0,
        opposing: bool | Opposing = False,
        dose: Sequence[float] | Mapping[str, Any] | None = None,
        limit: int | None = None,
        about: Mapping[str, Any] | None = None,
        strengths: Sequence[float] = (1.0, -1.0),
        few: int = 6,
        extras: Sequence[Extra] = (),
        system: ValueSystem | None = None,
        samples: int = DRAWS,
        seed: int = 0,
        checkpoint: str | os.PathLike[str] | None = None,
        part: int = 0,
        tell: Callable[[str], None] = silent,
    ) -> Run:
        """A run from what [`evaluate`] takes, with its defaults filled in."""
        if limit is not None and limit < 1:
            raise NeVAError(f"`limit` must be at least 1, got {limit}.")
        candidates = [Candidate.of(method) for method in methods]
        dialled = list(candidates[0].values if values is None and candidates else values or [])
        texts = load_neutral_texts("heldout", NEUTRAL_TEXTS) if neutral_texts is None else neutral_texts
        request = Request(
            candidates=candidates,
            scenarios=list(scenarios)[:limit],
            texts=[text for text in texts if len(tokenizer(text)["input_ids"]) >= 2],
            values=dialled,
            strengths=list(strengths),
            pairs=chosen_pairs(dialled, pairs, seed),
            opposing=opposing_prompt if opposing is True else opposing or None,
            dose=dose if dose is None or isinstance(dose, Mapping) else list(dose),
            few=few,
            extras=extras,
            system=system,
            about=dict(about or {}),
            samples=samples,
            seed=seed,
        )
        return cls(request, model, tokenizer, checkpoint=checkpoint, part=part, tell=tell)

    def shares(self, parts: int) -> list[list[str]]:
        """Divides what is not kept yet among processes.

        Args:
            parts (`int`): How many processes.

        Returns:
            `list[list[str]]`: The names of each one's pieces, for [`Run.work`].
        """
        todo = [piece for piece in self.pieces.all() if piece.name not in self.kept]
        fits = {one.name: one.fit_cost for one in self.request.candidates}
        return [[piece.name for piece in part] for part in share_out(todo, parts, fits)]

    def work(self, names: Collection[str] | None = None) -> None:
        """Computes what is not kept yet.

        Args:
            names (`Collection[str]`, *optional*): Only these pieces.
        """
        pieces = [piece for piece in self.pieces.all() if piece.name not in self.kept]
        pieces = [piece for piece in pieces if names is None or piece.name in names]
        needed = {piece.needs for piece in pieces}
        for candidate in sorted(self.request.candidates, key=lambda one: one.changes_model):
            if candidate.name in needed:
                if candidate.fit_cost:
                    self.tell(f"fitting {candidate.name}")
                candidate.method()
        work_off(self.kept, pieces, self.tell)

    def report(self) -> dict[str, Any]:
        """The report, from the kept pieces.

        Raises:
            `NeVAError`: If pieces are missing.
        """
        self.kept.refresh()
        return Assembly(self.pieces, self.fingerprint).report()
