"""What a NeVA adapter is made of, as PEFT keeps it in `adapter_config.json`.

The config says everything about a neuron map but the numbers of its edits: which values it dials, in which modules of
which base model, how strengths are scaled, how far they may be turned, and where the map came from. A config is read
from strangers' repositories, so every field is checked when it is made.
"""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, TaskType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from .config_checks import (
    MAX_GATE_PROBABILITY,
    check_base_facts,
    check_counts,
    check_module_names,
    check_pairs,
    check_value_names,
    is_number,
)
from .errors import NeVAError
from .strengths import MAX_STRENGTH
from .strict_json import check_plain

__all__ = ["NeVAConfig", "NevaType", "check_value_names"]


class NevaType(str, enum.Enum):
    """The PEFT type of the method. PEFT's own enum is closed, and PEFT reads `.value` of what stands in its place."""

    NEVA = "NEVA"


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
        # PEFT passes the type as the text that it read; code passes none, or the type itself.
        read_by_peft = type(self.peft_type) is str
        try:
            super().__post_init__()
        except TypeError as error:  # (a task type that cannot even be looked up)
            raise NeVAError(f"`task_type` must be one of PEFT's task types, got {self.task_type!r:.80}.") from error
        self.peft_type = NevaType.NEVA
        if self.task_type is None:
            self.task_type = TaskType.CAUSAL_LM
        if read_by_peft and isinstance(self.target_modules, str):
            # A stranger's expression could keep the matcher busy for years, and the tensors name their modules anyway.
            raise NeVAError(
                f"`target_modules` of this neuron map is the regular expression {self.target_modules!r:.80}, and those of "
                "files are not run. Load the map with NeVAModel.from_pretrained, and save it again."
            )
        self._check_target_modules()
        self.values = check_value_names(self.values)
        self.neurons = check_counts(self.neurons, len(self.values))
        for name in ("use_gain", "use_gate"):
            if not isinstance(getattr(self, name), bool):
                raise NeVAError(f"`{name}` must be True or False, got {getattr(self, name)!r:.80}.")
        if not is_number(self.gate_probability, 0.5, MAX_GATE_PROBABILITY):
            raise NeVAError(
                f"`gate_probability` must be between 0.5 and {MAX_GATE_PROBABILITY}, got {self.gate_probability!r:.80}."
            )
        self.units = check_pairs("units", self.units, self.values, 0.0, MAX_STRENGTH)
        self.ranges = check_pairs("ranges", self.ranges, self.values, -MAX_STRENGTH, MAX_STRENGTH)
        for name, (lowest, highest) in self.ranges.items():
            if lowest > 0 or highest < 0:
                raise NeVAError(f"`ranges[{name!r}]` must hold 0 between its ends, got [{lowest:g}, {highest:g}].")
        self._check_default_strengths()
        for name in ("base_model_name_or_path", "revision"):
            text = getattr(self, name)
            if text is not None and not isinstance(text, str):
                raise NeVAError(f"`{name}` must be a text or None, got {type(text).__name__}.")
        for name in ("provenance", "measurements"):
            if not isinstance(getattr(self, name), Mapping):
                raise NeVAError(f"`{name}` must be a dictionary, got {type(getattr(self, name)).__name__}.")
        for name in ("value_system", "base"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), Mapping):
                raise NeVAError(f"`{name}` must be a dictionary or None, got {type(getattr(self, name)).__name__}.")
        for name in ("provenance", "measurements", "value_system", "base"):
            check_plain(getattr(self, name), f"`{name}`")
        if self.base is not None:
            check_base_facts(self.base)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> NeVAConfig:
        """Reads a config as PEFT does, after a look at both files of the map.

        This is where PEFT passes before it puts an adapter of this type into a model, so that most of what
        [`NeuronMap.from_pretrained`] refuses is refused there too (see [`~neva_hf.map_files.check_for_peft`]).

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder, or the id of a Hub repository.
            subfolder (`str`, *optional*): Where in it.
            kwargs (`Any`): As for [`~peft.PeftConfig.from_pretrained`], such as `revision` and `token`.

        Returns:
            [`NeVAConfig`]: The config.

        Raises:
            `NeVAError`: If the map is not sound.
        """
        # (the reading of files is built on this class)
        from .map_files import check_for_peft

        modules = check_for_peft(pretrained_model_name_or_path, subfolder, kwargs)
        config: NeVAConfig = super().from_pretrained(str(pretrained_model_name_or_path), subfolder=subfolder, **kwargs)
        if modules is not None:
            config.target_modules = sorted(modules)
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """The fields that a config file holds, read strictly."""
        from .map_files import read_fields

        # (PEFT takes the regular expressions of files; the names of the tensors take its place)
        fields = read_fields(path_json_file)
        return fields | ({"target_modules": None} if isinstance(fields.get("target_modules"), str) else {})

    def _check_target_modules(self) -> None:
        if isinstance(self.target_modules, (list, tuple, set)):
            self.target_modules = sorted(check_module_names("target_modules", self.target_modules))
        elif isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except (re.error, OverflowError, RecursionError) as error:
                raise NeVAError(
                    f"`target_modules` is one text, {self.target_modules!r:.80}, which must be a regular expression "
                    f"({error}). Give a list for names."
                ) from error
        elif self.target_modules is not None:
            raise NeVAError(
                "`target_modules` must be a list of module names, a regular expression or None, got "
                f"{type(self.target_modules).__name__}."
            )

    def _check_default_strengths(self) -> None:
        if not isinstance(self.default_strengths, Mapping):
            raise NeVAError("`default_strengths` must map values to numbers, such as {'benevolence': 1.0}.")
        for name, strength in self.default_strengths.items():
            if name not in self.values:
                raise NeVAError(f"`default_strengths` names {name!r:.80}, not one of this map's values {self.values}.")
            if not is_number(strength, -MAX_STRENGTH, MAX_STRENGTH):
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
