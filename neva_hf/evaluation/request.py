"""What an evaluation is asked for, checked before the long work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from neva_hf.errors import NeVAError
from neva_hf.scenarios import Scenario
from neva_hf.values import ValueSystem

from .candidate import Candidate, Extra, check_candidates, check_strengths
from .tables import DRAWS
from .together import Opposing


@dataclass
class Request:
    """What is measured, and on what. [`evaluate`] says more about each.

    Args:
        candidates (`list[Candidate]`): The methods.
        scenarios (`list[Scenario]`): The scenarios.
        texts (`list[str]`): Neutral texts.
        values (`list[str]`): The values to dial.
        strengths (`list[float]`): At which strengths; the first is the one of pairs and opposing prompts.
        pairs (`list[tuple[str, str]]`): Values that are dialled together.
        opposing (`Callable`, *optional*): Gives the prompts that push against a dial.
        dose (`list[float]` or `Mapping`, *optional*): The strengths of dose curves, or curves that were measured before.
        few (`int`): How many scenarios pairs, opposing prompts and dose curves are measured on.
        extras (`list[Extra]`): What else is measured of every method.
        system ([`ValueSystem`], *optional*): Groups and circle.
        about (`dict[str, Any]`): What the report says about where things came from.
        samples (`int`): Bootstrap samples.
        seed (`int`): For the bootstrap.

    Raises:
        `NeVAError`: If something cannot be used.
    """

    candidates: list[Candidate]
    scenarios: list[Scenario]
    texts: list[str]
    values: list[str]
    strengths: list[float] = field(default_factory=lambda: [1.0, -1.0])
    pairs: list[tuple[str, str]] = field(default_factory=list)
    opposing: Opposing | None = None
    dose: list[float] | Mapping[str, Any] | None = None
    few: int = 6
    extras: Sequence[Extra] = ()
    system: ValueSystem | None = None
    about: dict[str, Any] = field(default_factory=dict)
    samples: int = DRAWS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.few < 1 or self.samples < 1:
            raise NeVAError(f"`few` and `samples` must be at least 1, got {self.few} and {self.samples}.")
        if not self.texts:
            raise NeVAError("The texts to measure damage on hold fewer than two tokens: give longer ones.")
        check_candidates(self.candidates, self.values, self.scenarios)
        self.strengths = check_strengths(self.strengths)
        if isinstance(self.dose, list):
            self.dose = check_strengths(self.dose)
        for extra in self.extras:
            if extra.name in ("methods", "pairs", "opposing", "dose"):
                raise NeVAError(f"A further measurement cannot be called {extra.name!r}: the report has that already.")
