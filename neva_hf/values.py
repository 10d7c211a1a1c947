"""Value systems: which values there are, what they mean and how they stand to each other.

A system is plain data, checked when it is made, so that every later part may trust it. Leakage is grouped by the
`relation` of two values; the rule that holds throughout is that a relation is the same seen from either side.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from neva_hf.errors import NeVAError
from neva_hf.value_parts import MAX_FILE_BYTES as MAX_FILE_BYTES
from neva_hf.value_parts import MAX_VALUES as MAX_VALUES
from neva_hf.value_parts import (
    Value,
    check_keys,
    check_name,
    check_text,
    checked_groups,
    checked_opposites,
    checked_values,
    read_plain_data,
    read_values,
    unknown_name,
    write_plain_data,
)

Relation = Literal["same", "within", "adjacent", "opposite", "other"]

_SHIPPED = Path(__file__).with_name("value_systems")
_FACING = 135.0  # degrees: halfway between a right angle and straight across


@dataclass(frozen=True)
class ValueSystem:
    """Values with their groups and, where there is one, their circle.

    It is a collection of `Value`s: `len(system)`, `for value in system`, `"power" in system` (a name or a `Value`) and
    `system["power"]`. Wherever a name is asked for, an unknown one raises a `NeVAError` that lists the known names and
    the closest match.

    Args:
        name (`str`): What code calls it, in the form of a value's name.
        label (`str`): What people read.
        description (`str`): What the system describes, in a few sentences.
        values (`tuple[Value, ...]`): 1 to 256 values; all of them have an angle, or none has.
        source (`str`, *optional*): The work to cite.
        groups (`Mapping[str, tuple[str, ...]]`, *optional*): Higher-order groups; a value may be in several.
        opposite_groups (`Mapping[str, str]`, *optional*): Which group competes with which; one direction is enough,
            the other is filled in. Groups that are neither the same nor opposite are adjacent.

    Raises:
        NeVAError: If the parts do not fit together; the message names the field.

    Example:

    ```py
    >>> from neva_hf.values import Value, ValueSystem
    >>> trait = Value("extraversion", "Extraversion", "Being outgoing and lively.")
    >>> system = ValueSystem("one_trait", "One trait", "Extraversion alone.", (trait,))
    >>> len(system), "extraversion" in system, system.names, system.has_circle
    (1, True, ('extraversion',), False)
    ```
    """

    name: str
    label: str
    description: str
    values: tuple[Value, ...]
    source: str = ""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    opposite_groups: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_name("name", self.name)
        check_text("label", self.label)
        check_text("description", self.description)
        if self.source != "":
            check_text("source", self.source)
        object.__setattr__(self, "values", checked_values(self.values))
        object.__setattr__(self, "groups", checked_groups(self.groups, self.names))
        object.__setattr__(self, "opposite_groups", checked_opposites(self.opposite_groups, self.groups))

    @property
    def names(self) -> tuple[str, ...]:
        """`tuple[str, ...]`: The names of the values, in the system's order."""
        return tuple(value.name for value in self.values)

    @property
    def has_circle(self) -> bool:
        """`bool`: Whether the values have angles, so that `distance` and `neighbours` can be asked."""
        return self.values[0].angle is not None

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[Value]:
        return iter(self.values)

    def __contains__(self, value: object) -> bool:
        return value in self.values or value in self.names

    def __getitem__(self, name: str) -> Value:
        for value in self.values:
            if value.name == name:
                return value
        raise NeVAError(f"{self.name}: value {unknown_name(name, self.names)}")

    def groups_of(self, name: str) -> tuple[str, ...]:
        """The groups that a value is in: two for one on a border, none for one that stands alone.

        Args:
            name (`str`): A value of this system.

        Returns:
            `tuple[str, ...]`: Group names, in the system's order.

        Example:

        ```py
        >>> load_value_system("schwartz10").groups_of("hedonism")
        ('openness_to_change', 'self_enhancement')
        ```
        """
        value = self[name]
        return tuple(group for group, members in self.groups.items() if value.name in members)

    def distance(self, a: str, b: str) -> float:
        """How far two values are apart on the circle.

        Args:
            a (`str`): A value of this system.
            b (`str`): Another, or the same.

        Returns:
            `float`: Degrees, from 0 (the same direction) to 180 (straight across).

        Raises:
            NeVAError: If the system has no circle.

        Example:

        ```py
        >>> load_value_system("schwartz10").distance("self_direction", "universalism")
        36.0
        ```
        """
        apart = abs(self._angle(a) - self._angle(b))
        return min(apart, 360 - apart)

    def neighbours(self, name: str) -> tuple[str, ...]:
        """The values that stand next to one on the circle.

        Args:
            name (`str`): A value of this system.

        Returns:
            `tuple[str, ...]`: All values at the next angle before it, at its own angle and at the next angle after it.

        Raises:
            NeVAError: If the system has no circle.

        Example:

        ```py
        >>> load_value_system("schwartz10").neighbours("self_direction")
        ('universalism', 'stimulation')
        ```
        """
        here = self._angle(name)
        turns = {other: (self._angle(other) - here) % 360 for other in self.names if other != name}
        away = [turn for turn in turns.values() if turn] or [0.0]
        return tuple(dict.fromkeys(o for next_to in (max(away), 0, min(away)) for o in turns if turns[o] == next_to))

    def opposites(self, name: str) -> tuple[str, ...]:
        """The values that compete with one: all whose `relation` to it is `"opposite"`.

        Args:
            name (`str`): A value of this system.

        Returns:
            `tuple[str, ...]`: Names, the farthest on the circle first; empty where the system knows no opposites.

        Example:

        ```py
        >>> load_value_system("schwartz10").opposites("achievement")
        ('benevolence', 'universalism')
        ```
        """
        found = [other for other in self.names if self.relation(name, other) == "opposite"]
        return tuple(sorted(found, key=lambda other: -self.distance(name, other) if self.has_circle else 0))

    def relation(self, a: str, b: str) -> Relation:
        """How two values stand to each other.

        Groups decide. Where they disagree (a value on a border is opposite through one of its groups and adjacent
        through the other) or are silent, the circle decides: opposite from 135 degrees on, else adjacent.

        Args:
            a (`str`): A value of this system.
            b (`str`): Another, or the same.

        Returns:
            `str`: `"same"`, `"within"` (they share a group), `"adjacent"`, `"opposite"`, or `"other"` if neither
            groups nor a circle say anything about the two.

        Example:

        ```py
        >>> [load_value_system("schwartz10").relation("power", b) for b in ("hedonism", "security", "universalism")]
        ['within', 'adjacent', 'opposite']
        ```
        """
        ours, theirs = self.groups_of(a), self.groups_of(b)
        if a == b:
            return "same"
        if set(ours) & set(theirs):
            return "within"
        facing = {self.opposite_groups.get(group) == other for group in ours for other in theirs}
        if facing == {True}:
            return "opposite"
        if facing == {False} and self.opposite_groups:
            return "adjacent"
        if self.has_circle:
            return "opposite" if self.distance(a, b) >= _FACING else "adjacent"
        return "opposite" if True in facing else "other"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, YAML or a config; `from_dict` reads it.

        Returns:
            `dict[str, Any]`: The fields, as strings, numbers, lists and dicts only.

        Example:

        ```py
        >>> load_value_system("schwartz10").to_dict()["groups"]["self_transcendence"]
        ['benevolence', 'universalism']
        ```
        """
        values = [{key: item for key, item in vars(value).items() if item is not None} for value in self.values]
        groups = {group: list(members) for group, members in self.groups.items()}
        return {**vars(self), "values": values, "groups": groups, "opposite_groups": dict(self.opposite_groups)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ValueSystem:
        """Make a system from plain data.

        Args:
            data (`Mapping[str, Any]`): The fields of `ValueSystem`; `values` is a list of the fields of `Value`.

        Returns:
            `ValueSystem`: The checked system.

        Raises:
            NeVAError: If a key is unknown or missing, or a field does not fit; the message names it.

        Example:

        ```py
        >>> system = load_value_system("big_five")
        >>> ValueSystem.from_dict(system.to_dict()) == system
        True
        ```
        """
        required, optional = ("name", "label", "description", "values"), ("source", "groups", "opposite_groups")
        check_keys("the value system", data, required, optional)
        return cls(**{**data, "values": read_values(data["values"])})

    def _angle(self, name: str) -> float:
        angle = self[name].angle
        if angle is None:
            raise NeVAError(f"{self.name} has no circle, so nothing is near or far on it; give each value an angle")
        return angle


def available_value_systems() -> list[str]:
    """The value systems that come with the package.

    Returns:
        `list[str]`: Names that `load_value_system` takes.

    Example:

    ```py
    >>> available_value_systems()
    ['big_five', 'schwartz10', 'schwartz19']
    ```
    """
    return sorted(path.stem for path in _SHIPPED.glob("*.json"))


def load_value_system(name_or_path: str | os.PathLike[str] = "schwartz10") -> ValueSystem:
    """Load a value system: a shipped one, or your own from a file.

    Args:
        name_or_path (`str` or `os.PathLike`, *optional*, defaults to `"schwartz10"`): One of
            `available_value_systems()`, which win over files of that name, or a .json, .yaml or .yml file up to 1 MiB.

    Returns:
        `ValueSystem`: The checked system.

    Raises:
        NeVAError: If there is no such name or file, or the file does not fit; the message names the field or line.

    Example:

    ```py
    >>> from neva_hf.values import load_value_system
    >>> load_value_system()["power"].label
    'Power'
    ```
    """
    shipped, name = available_value_systems(), str(name_or_path)
    path = _SHIPPED / f"{name}.json" if name in shipped else Path(name)
    if not os.path.isfile(path):
        raise NeVAError(f"{unknown_name(name, shipped)}, or the path of an existing .json, .yaml or .yml file")
    try:
        return ValueSystem.from_dict(read_plain_data(path))
    except NeVAError as error:
        raise NeVAError(f"{path}: {error}") from error.__cause__


def save_value_system(system: ValueSystem, path: str | os.PathLike[str]) -> None:
    """Write a value system as a JSON file that `load_value_system` reads.

    Args:
        system (`ValueSystem`): What to write.
        path (`str` or `os.PathLike`): A path that ends in .json, in a folder that exists.

    Raises:
        NeVAError: If the path does not end in .json, or the file would be too large to be loaded.

    Example:

    ```py
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/traits.json"
    >>> save_value_system(load_value_system("big_five"), path)
    >>> load_value_system(path).names[0]
    'openness'
    ```
    """
    write_plain_data(system.to_dict(), Path(path))
