"""From finished pieces to the report: one function of what is kept, the scenarios' keys, the value system and the seed."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers

from neva_hf._version import __version__
from neva_hf.baselines.method import Dials
from neva_hf.errors import NeVAError
from neva_hf.scenarios import scenario_values, scenarios_hash

from . import dose as doses
from .candidate import Candidate
from .pieces import Pieces
from .summary import beside, spent, summary
from .tables import Tables, draws, tables
from .together import opposing_report, pair_report

SCHEMA = "neva-hf/evaluation/1"


@dataclass
class Assembly:
    """Puts the report of one run together.

    Args:
        pieces ([`Pieces`]): What was asked for.
        fingerprint (`str`): Of the model.
    """

    pieces: Pieces
    fingerprint: str

    def __post_init__(self) -> None:
        self.request, self.kept = self.pieces.request, self.pieces.kept

    def report(self) -> dict[str, Any]:
        """The report, from the kept pieces.

        Raises:
            `NeVAError`: If pieces are missing.
        """
        if missing := [piece.label for piece in self.pieces.all() if piece.name not in self.kept]:
            raise NeVAError(f"{len(missing)} pieces of this evaluation are not finished; the first is {missing[0]!r}.")
        asked = self.request
        weights = draws(len(asked.scenarios), asked.samples, asked.seed)
        forms = [scenario.form for scenario in asked.scenarios]
        methods = {one.name: {**self.kept[self.pieces.about(one).name], "strengths": {}} for one in asked.candidates}
        compared: dict[str, dict[str, Any]] = {one.name: {} for one in asked.candidates[1:]}
        for strength in asked.strengths:
            side = f"{strength:+g}"
            found = {one.name: self._tables(one, strength) for one in asked.candidates}
            for candidate in asked.candidates:
                cost = self.kept[self.pieces.damage(candidate, strength).name]
                methods[candidate.name]["strengths"][side] = {
                    **summary(found[candidate.name], weights, asked.system, forms),
                    "damage": spent(cost, asked.values, asked.seed),
                }
            for name in compared:
                compared[name][side] = beside(found[asked.candidates[0].name], found[name], weights)
        extras: dict[str, Any] = {}
        for extra in asked.extras:
            base = self.kept[self.pieces.extra(extra, None).name]
            told = {one.name: self.kept[self.pieces.extra(extra, one).name] for one in asked.candidates}
            extras[extra.name] = {
                "base": extra.sum_up(base, None),
                "methods": {name: extra.sum_up(base, found) for name, found in told.items()},
            }
        return {
            **self._head(),
            "methods": methods,
            "first_beside": compared,
            "pairs": self._pairs(),
            "opposing": self._opposing(),
            "dose": self._dose(),
            **extras,
        }

    def _tables(self, candidate: Candidate, strength: float) -> Tables:
        edited = {value: self._told(candidate, {value: strength}) for value in self.request.values}
        return tables(self._told(None, {}), edited, self._observed(), 1 if strength > 0 else -1)

    def _observed(self) -> list[str]:
        """The values that the scenarios hold, in the order of the circle where there is one."""
        found, system = scenario_values(self.request.scenarios), self.request.system
        known = system is not None and all(value in system for value in found)
        return [value for value in system.names if value in found] if known and system is not None else found

    def _told(self, candidate: Candidate | None, dials: Dials, prompt: str | None = None, few: bool = False) -> Any:
        found = self.kept[self.pieces.replies(candidate, dials, prompt, few=few).name]
        return found[: self.request.few] if few else found

    def _alone(self) -> tuple[Any, dict[str, Any], int]:
        """The first few scenarios at strength 0 and with each value dialled, and the sign of the strength."""
        asked, first, strength = self.request, self.request.candidates[0], self.request.strengths[0]
        dialled = {value: self._told(first, {value: strength}, few=True) for value in asked.values}
        return self._told(None, {}, few=True), dialled, 1 if strength > 0 else -1

    def _pairs(self) -> dict[str, Any] | None:
        asked, first, strength = self.request, self.request.candidates[0], self.request.strengths[0]
        if not asked.pairs:
            return None
        base, alone, sign = self._alone()
        both = {(one, two): self._told(first, {one: strength, two: strength}, few=True) for one, two in asked.pairs}
        return pair_report(base, alone, both, sign, asked.system, asked.seed)

    def _opposing(self) -> dict[str, Any] | None:
        asked, first, strength = self.request, self.request.candidates[0], self.request.strengths[0]
        if asked.opposing is None:
            return None
        base, alone, sign = self._alone()
        prompts = {value: asked.opposing(value, strength) for value in asked.values}
        pushed = {value: self._told(None, {}, prompt, few=True) for value, prompt in prompts.items()}
        both = {value: self._told(first, {value: strength}, prompt, few=True) for value, prompt in prompts.items()}
        return {**opposing_report(base, alone, pushed, both, sign, asked.seed), "prompts": prompts}

    def _dose(self) -> dict[str, Any] | None:
        asked, first = self.request, self.request.candidates[0]
        if asked.dose is None:
            return None
        if isinstance(asked.dose, Mapping):
            return {"source": "the map", **asked.dose}
        edited = {
            strength: {value: self._told(first, {value: strength}, few=True) for value in asked.values}
            for strength in asked.dose
        }
        damage = {strength: self.kept[self.pieces.damage(first, strength, few=True).name] for strength in asked.dose}
        few = asked.scenarios[: asked.few]
        return doses.curves(self._told(None, {}, few=True), edited, damage, scenario_values(few))

    def _head(self) -> dict[str, Any]:
        asked, model = self.request, self.pieces.model
        name = str(getattr(model, "name_or_path", "") or getattr(model.config, "_name_or_path", ""))
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        told = {key: item for key, item in asked.about.items() if key != "scenarios"}
        scenarios = {"count": len(asked.scenarios), "sha256": scenarios_hash(asked.scenarios)}
        return {
            "schema": SCHEMA,
            **told,
            "model": {"name": name, "dtype": dtype, "fingerprint": self.fingerprint},
            "scenarios": {**asked.about.get("scenarios", {}), **scenarios, "few": len(asked.scenarios[: asked.few])},
            "values": asked.values,
            "observed": self._observed(),
            "value_system": asked.system.name if asked.system is not None else None,
            "strengths": asked.strengths,
            "bootstrap": {"samples": asked.samples, "seed": asked.seed, "interval": "95%, percentile"},
            "versions": {
                "neva_hf": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }
