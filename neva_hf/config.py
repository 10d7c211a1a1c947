"""What a NeVA adapter is made of, as PEFT keeps it in `adapter_config.json`.

The config says everything about a neuron map but the numbers of its edits: which values it dials, in which modules of
which base model, how strengths are scaled, how far they may be turned, and where the map came from. A config is read
from strangers' repositories, so every field is checked when it is made.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, TaskType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from .errors import NeVAError
from .strengths import MAX_STRENGTH

MAX_VALUES = 256
MAX_NEURONS_PER_MODULE = 1 << 20
# Beyond it float32 knows no finite logit that could be reached for.
MAX_GATE_PROBABILITY = 0.999999

# `gate` is a keyword of the calls that also take values by name, so no value may have that name.
RESERVED_NAMES = frozenset({"gate"})

_VALUE_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}\Z")


class NevaType(str, enum.Enum):
    """The PEFT type of the method. PEFT's own enum is closed, and PEFT reads `.value` of what stands in its place."""

    NEVA = "NEVA"


def check_value_names(values: Any) -> list[str]:
    """Checks the value names of a map, in the order of its tensors' rows.

    Args:
        values (`list[str]`): Lower-case names such as `benevolence` or `self_direction`.

    Returns:
        `list[str]`: The same names, as a new list.

    Raises:
        `NeVAError`: For no names at all, more than 256, a name twice, or a name that is not snake_case.

    Example:

    ```py
    >>> from neva_hf.config import check_value_names
    >>> check_value_names(["benevolence", "power"])
    ['benevolence', 'power']
    ```
    """
    if isinstance(values, str) or not isinstance(values, (list, tuple)):
        raise NeVAError(f"`values` must be a list of names such as ['benevolence', 'power'], got {values!r:.80}.")
    if not 1 <= len(values) <= MAX_VALUES:
        raise NeVAError(f"`values` must hold 1 to {MAX_VALUES} names, got {len(values)}.")
    for name in values:
        if not isinstance(name, str) or not _VALUE_NAME.match(name) or name in RESERVED_NAMES:
            raise NeVAError(
                f"{name!r:.80} cannot be the name of a value: use lower-case letters, digits and underscores, at most "
                f"64, beginning with a letter (and not {sorted(RESERVED_NAMES)}), such as 'self_direction'."
            )
    repeated = sorted({name for name in values if values.count(name) > 1})
    if repeated:
        raise NeVAError(f"Each value may stand once in `values`, but these stand more often: {repeated}.")
    return list(values)


def _is_number(number: Any, low: float, high: float) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and low <= number <= high


def _check_pairs(field_name: str, pairs: Any, values: list[str], low: float, high: float) -> dict[str, list[float]]:
    """Checks a mapping value -> [negative side, positive side]."""
    if not isinstance(pairs, Mapping):
        raise NeVAError(f"`{field_name}` must map values to two numbers, got {type(pairs).__name__}.")
    checked = {}
    for name, pair in pairs.items():
        if name not in values:
            raise NeVAError(f"`{field_name}` names {name!r:.80}, which is not one of this map's values {values}.")
        if not isinstance(pair, (list, tuple)) or [_is_number(number, low, high) for number in pair] != [True, True]:
            raise NeVAError(
                f"`{field_name}[{name!r}]` must be two numbers between {low:g} and {high:g}, got {pair!r:.80}."
            )
        checked[name] = [float(number) for number in pair]
    return checked


@dataclass
class NeVAConfig(PeftConfig):
    """The configuration of a NeVA adapter.

    Most maps come from [`identify_neurons`], which fills all fields. Made by hand, `values` and `neurons` are enough;
    the adapter then starts as the identity.

    Args:
        target_modules (`list[str]` or `str`, *optional*):
            The FFN down projections to edit: names, name endings, or a regular expression. Found from the
            architecture when `None`.
        values (`list[str]`):
            The values that can be dialled, in the order of the rows of the adapter's tensors.
        neurons (`int` or `dict[str, int]`):
            How many neurons are edited in each module: one number for all, or one per module name.
        use_gain (`bool`):
            Whether edits have a part that is proportional to the activation (`gain` of DESIGN: `x + s*(shift + gain*x)`).
        use_gate (`bool`):
            Whether each value has a probe that decides per token how much of the edit is needed.
        gate_probability (`float`):
            The probability that the probe of a gated value is brought to.
        default_strengths (`dict[str, float]`):
            Strengths that are in force when the adapter is loaded. Empty means that loading changes nothing.
        units (`dict[str, [float, float]]`):
            Per value, what strengths are multiplied with when they are negative and when they are positive, so that
            both -1 and +1 cost the same KL divergence (calibration). Values that are not named have `[1, 1]`.
        ranges (`dict[str, [float, float]]`):
            Per value, the lowest and the highest strength at which the model is known to stay fluent.
        value_system (`dict`, *optional*):
            The definitions of the values, as [`ValueSystem.to_dict`] writes them.
        base (`dict`, *optional*):
            The shape of the base model (`hidden_size`, `intermediate_size`, `num_hidden_layers`, `model_type`), to
            refuse others.
        provenance (`dict`):
            How the map was made: method, settings, scenario hash, versions.
        measurements (`dict`):
            What was measured when the map was made, such as the calibrated KL divergence per value and sign.

    Raises:
        `NeVAError`: If a field cannot be used; the message names the field.

    Example:

    ```py
    >>> from neva_hf import NeVAConfig
    >>> config = NeVAConfig(values=["benevolence", "power"], neurons=16)
    >>> config.peft_type.value
    'NEVA'
    ```
    """

    if TYPE_CHECKING:  # the fields of PEFT's class, which has no types to check
        peft_type: Any = None
        task_type: Any = None
        base_model_name_or_path: str | None = None
        revision: str | None = None
        inference_mode: bool = False

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "FFN down projections to edit; found from the architecture when None."}
    )
    values: list[str] = field(default_factory=lambda: ["value"], metadata={"help": "The values that can be dialled."})
    neurons: int | dict[str, int] = field(default=8, metadata={"help": "Edited neurons, in all or per module name."})
    use_gain: bool = field(default=False, metadata={"help": "Whether edits have a part proportional to the input."})
    use_gate: bool = field(default=False, metadata={"help": "Whether a probe decides per token how much is needed."})
    gate_probability: float = field(default=0.9, metadata={"help": "The probability that a gate reaches for."})
    default_strengths: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Strengths in force after loading; empty changes nothing."}
    )
    units: dict[str, list[float]] = field(
        default_factory=dict, metadata={"help": "Per value the factor of negative and of positive strengths."}
    )
    ranges: dict[str, list[float]] = field(
        default_factory=dict, metadata={"help": "Per value the lowest and the highest fluent strength."}
    )
    value_system: dict[str, Any] | None = field(default=None, metadata={"help": "The definitions of the values."})
    base: dict[str, Any] | None = field(default=None, metadata={"help": "The shape of the base model."})
    provenance: dict[str, Any] = field(default_factory=dict, metadata={"help": "How the map was made."})
    measurements: dict[str, Any] = field(default_factory=dict, metadata={"help": "What was measured when made."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = NevaType.NEVA
        if self.task_type is None:
            self.task_type = TaskType.CAUSAL_LM
        self._check_target_modules()
        self.values = check_value_names(self.values)
        self.neurons = self._checked_neurons()
        for name in ("use_gain", "use_gate"):
            if not isinstance(getattr(self, name), bool):
                raise NeVAError(f"`{name}` must be True or False, got {getattr(self, name)!r:.80}.")
        if not _is_number(self.gate_probability, 0.5, MAX_GATE_PROBABILITY):
            raise NeVAError(
                f"`gate_probability` must be between 0.5 and {MAX_GATE_PROBABILITY}, got {self.gate_probability!r:.80}."
            )
        self.units = _check_pairs("units", self.units, self.values, 0.0, MAX_STRENGTH)
        self.ranges = _check_pairs("ranges", self.ranges, self.values, -MAX_STRENGTH, MAX_STRENGTH)
        for name, (lowest, highest) in self.ranges.items():
            if lowest > 0 or highest < 0:
                raise NeVAError(f"`ranges[{name!r}]` must hold 0 between its ends, got [{lowest:g}, {highest:g}].")
        self._check_default_strengths()
        for name in ("provenance", "measurements"):
            if not isinstance(getattr(self, name), Mapping):
                raise NeVAError(f"`{name}` must be a dictionary, got {type(getattr(self, name)).__name__}.")
        for name in ("base_model_name_or_path", "revision"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), str):
                raise NeVAError(f"`{name}` must be a text or None, got {type(getattr(self, name)).__name__}.")
        for name in ("value_system", "base"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), Mapping):
                raise NeVAError(f"`{name}` must be a dictionary or None, got {type(getattr(self, name)).__name__}.")

    def _check_target_modules(self) -> None:
        if isinstance(self.target_modules, (list, tuple, set)):
            if not self.target_modules or not all(isinstance(name, str) and name for name in self.target_modules):
                raise NeVAError(f"`target_modules` must hold names of modules, got {self.target_modules!r:.80}.")
            self.target_modules = sorted(self.target_modules)
        elif isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise NeVAError(
                    f"`target_modules` is one text, {self.target_modules!r:.80}, which must be a regular expression "
                    f"({error}). Give a list for names."
                ) from error
        elif self.target_modules is not None:
            raise NeVAError(
                "`target_modules` must be a list of module names, a regular expression or None, got "
                f"{type(self.target_modules).__name__}."
            )

    def _checked_neurons(self) -> int | dict[str, int]:
        counts = list(self.neurons.values()) if isinstance(self.neurons, Mapping) else [self.neurons]
        names = list(self.neurons) if isinstance(self.neurons, Mapping) else ["all modules"]
        if not names or not all(isinstance(name, str) and name for name in names):
            raise NeVAError(f"`neurons` must map names of modules to numbers, got {self.neurons!r:.80}.")
        for count in counts:
            if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_NEURONS_PER_MODULE:
                raise NeVAError(
                    f"`neurons` must be a positive whole number or map module names to such numbers, got {count!r:.80}."
                )
        return dict(self.neurons) if isinstance(self.neurons, Mapping) else self.neurons

    def _check_default_strengths(self) -> None:
        if not isinstance(self.default_strengths, Mapping):
            raise NeVAError("`default_strengths` must map values to numbers, such as {'benevolence': 1.0}.")
        for name, strength in self.default_strengths.items():
            if name not in self.values:
                raise NeVAError(f"`default_strengths` names {name!r:.80}, not one of this map's values {self.values}.")
            if not _is_number(strength, -MAX_STRENGTH, MAX_STRENGTH):
                raise NeVAError(
                    f"`default_strengths[{name!r}]` must be a number between {-MAX_STRENGTH:g} and {MAX_STRENGTH:g}, got "
                    f"{strength!r:.80}."
                )

    def neurons_in(self, module_name: str) -> int:
        """How many neurons are edited in one module.

        Args:
            module_name (`str`): The full name of the down projection in the base model.

        Returns:
            `int`: The length of that module's `neva_index`.

        Raises:
            `NeVAError`: If `neurons` is a dictionary that does not name the module.
        """
        if isinstance(self.neurons, int):
            return self.neurons
        if module_name not in self.neurons:
            raise NeVAError(
                f"{module_name!r} is to be edited, but `neurons` does not say how many of its neurons. Name it in "
                "`neurons`, or give one number for all modules."
            )
        return self.neurons[module_name]


# Filled here rather than through `peft.utils.register_peft_method`, which admits only the members of PEFT's own enum.
# The tuner's two entries are made in tuner.py.
PEFT_TYPE_TO_CONFIG_MAPPING[NevaType.NEVA] = NeVAConfig
