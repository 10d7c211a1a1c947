"""What is evaluated: a method, or the promise of one that is fitted only when a run needs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from neva_hf.baselines.method import Dials, Method
from neva_hf.errors import NeVAError
from neva_hf.measure import contrast
from neva_hf.scenarios import Scenario
from neva_hf.strengths import unknown_value_message

from .kept import fingerprint


@dataclass
class Candidate:
    """A method by its name, made when it is first needed: a run whose pieces are all kept fits nothing.

    Args:
        name (`str`): As in tables.
        values (`list[str]`): What it can dial.
        make (`Callable[[], Method]`): Gives the method.
        key (`str`): A fingerprint of all that the method depends on besides the model.
        fit_cost (`float`): About how long `make` takes, in tokens that the model runs.
        changes_model (`bool`): Whether `make` puts something into the model: it is then made after all others.
    """

    name: str
    values: list[str]
    make: Callable[[], Method]
    key: str
    fit_cost: float = 0.0
    changes_model: bool = False
    _made: Method | None = field(default=None, repr=False)

    def method(self) -> Method:
        """The method, made once."""
        if self._made is None:
            self._made = self.make()
        return self._made

    @classmethod
    def of(cls, method: Method | Candidate) -> Candidate:
        """A method that is ready, told from others of its name by its notes."""
        if isinstance(method, Candidate):
            return method
        return cls(method.name, list(method.values), lambda: method, fingerprint([method.values, method.notes]))


def as_found(base: Any, found: Any) -> Any:
    """Reports what was found as it is."""
    return base if found is None else found


@dataclass(frozen=True)
class Extra:
    """Something more that is measured of every method, and of the base model: capability, generated answers.

    Args:
        name (`str`): Where it stands in the report.
        key (`Any`): What it depends on besides the method, as plain data.
        run (`Callable[[Method | None, list[Dials], Any], Any]`): Gets the method (`None`: the base model), the dials to
            measure it at (`[{}]` for the base model), and what another measurement found; gives plain data.
        cost (`float`): About how long it takes for one setting of the dials, in tokens that the model runs.
        settings (`list[Dials]`, *optional*): The dials; every value at every strength unless given.
        after (`str`): The name of the measurement whose findings it needs, if any.
        sum_up (`Callable[[Any, Any], Any]`): Makes what is reported, from what was found of the base model and of the
            method; for the base model itself the latter is `None`.
    """

    name: str
    key: Any
    run: Callable[[Method | None, list[Dials], Any], Any]
    cost: float = 1.0
    settings: list[Dials] | None = None
    after: str = ""
    sum_up: Callable[[Any, Any], Any] = as_found


def check_candidates(candidates: Sequence[Candidate], values: Sequence[str], scenarios: Sequence[Scenario]) -> None:
    """Refuses what cannot be evaluated, before the long work.

    Raises:
        `NeVAError`: If there is no method, two have one name, one cannot dial a value, or the scenarios do not contrast a
            value.
    """
    if not candidates:
        raise NeVAError("There is nothing to evaluate: give at least one method.")
    names = [candidate.name for candidate in candidates]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise NeVAError(f"Two methods are called {twice[0]!r}: give each a name of its own.")
    if not values or len(set(values)) < len(values):
        raise NeVAError(f"`values` must name at least one value, and each once, got {list(values)}.")
    if not scenarios:
        raise NeVAError("There are no scenarios to evaluate on.")
    for candidate in candidates:
        for value in values:
            if value not in candidate.values:
                raise NeVAError(f"{candidate.name}: {unknown_value_message(value, candidate.values)}")
    heard = [list(scenario.replies) for scenario in scenarios]
    if silent := [value for value in values if not any(contrast(keys, value) for keys in heard)]:
        raise NeVAError(
            f"The {len(scenarios)} scenarios hold no reply of {', '.join(silent)} with another to compare it with, so "
            "nothing can be said about it. Use scenarios that do (or more of them), or leave these values out."
        )


def check_strengths(strengths: Sequence[float]) -> list[float]:
    """Refuses strengths that cannot be evaluated.

    Raises:
        `NeVAError`: If there is none, or one is 0, no finite number, or there twice.
    """
    found = [float(strength) for strength in strengths]
    sound = all(0 < abs(strength) < 1e6 for strength in found)  # (false for NaN as well)
    if not found or not sound or len(set(found)) < len(found):
        raise NeVAError(f"Strengths must be different finite numbers other than 0, such as 1 and -1, got {found}.")
    return found
