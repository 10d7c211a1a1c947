"""Value systems: which values there are, what they mean and how they stand to each other.

A system is plain data, checked when it is made, so that every later part may trust it. Leakage is grouped by the
`relation` of two values; the rule that holds throughout is that a relation is the same seen from either side.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from neva_hf.errors import NeVAError

Relation = Literal["same", "within", "adjacent", "opposite", "other"]

MAX_VALUES = 256
MAX_FILE_BYTES = 2**20

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_SHIPPED = Path(__file__).with_name("value_systems")
_FACING = 135.0  # degrees: halfway between a right angle and straight across


@dataclass(frozen=True)
class Value:
    """One value (or trait) that a model can be steered towards or away from. Misfitting fields raise a `NeVAError`.

    Args:
        name (`str`): What code calls it: a small letter, then at most 63 small letters, digits and `_`.
        label (`str`): What people read, e.g. `"Self-direction"`.
        definition (`str`): One or two sentences that say what living by it means.
        angle (`float`, *optional*): Its place on the circle in degrees, 0 <= angle < 360.

    Example:

    ```py
    >>> from neva_hf.values import Value
    >>> Value("thrift", "Thrift", "Spending little and wasting nothing.").label
    'Thrift'
    ```
    """

    name: str
    label: str
    definition: str
    angle: float | None = None

    def __post_init__(self) -> None:
        _check_name("name", self.name)
        _check_text("label", self.label)
        _check_text("definition", self.definition)
        if self.angle is not None:
            number = isinstance(self.angle, (int, float)) and not isinstance(self.angle, bool)
            fits = number and 0 <= self.angle < 360  # NaN compares false
            _check(fits, "angle", self.angle, "degrees as a number, 0 <= angle < 360, or no angle at all")
            object.__setattr__(self, "angle", float(self.angle))


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
        _check_name("name", self.name)
        _check_text("label", self.label)
        _check_text("description", self.description)
        if self.source != "":
            _check_text("source", self.source)
        for value in _as_list("values", self.values):
            _check(isinstance(value, Value), "an entry of values", value, "a Value; from_dict takes plain data")
        object.__setattr__(self, "values", _checked_values(self.values))
        object.__setattr__(self, "groups", _checked_groups(self.groups, self.names))
        object.__setattr__(self, "opposite_groups", _checked_opposites(self.opposite_groups, self.groups))

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
        raise NeVAError(f"{self.name}: value {_unknown(name, self.names)}")

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
        _check_keys("the value system", data, required, optional)
        values = []
        for position, item in enumerate(_as_list("values", data["values"])):
            try:
                _check_keys("the entry", item, ("name", "label", "definition"), ("angle",))
                values.append(Value(**item))
            except NeVAError as error:
                raise NeVAError(f"values[{position}]: {error}") from None
        return cls(**{**data, "values": tuple(values)})

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
            `available_value_systems()`, which wins over a file of that name, or a .json, .yaml or .yml file of at most
            1 MiB.

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
        raise NeVAError(f"{_unknown(name, shipped)}, or the path of an existing .json, .yaml or .yml file")
    try:
        return ValueSystem.from_dict(_read(path))
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
    raw = (json.dumps(system.to_dict(), indent=2, ensure_ascii=False) + "\n").encode()
    _check(Path(path).suffix.lower() == ".json", "path", str(path), "a path that ends in .json")
    _check_size(raw)
    Path(path).write_bytes(raw)


def _read(path: Path) -> Any:
    suffix = path.suffix.lower()
    _check(suffix in (".json", ".yaml", ".yml"), "the file's ending", suffix, ".json, .yaml or .yml")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        _check_size(raw)
        text = raw.decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=_unique_keys) if suffix == ".json" else _load_yaml(text)
    except NeVAError:
        raise
    except json.JSONDecodeError as error:
        raise NeVAError(f"line {error.lineno} is not valid JSON: {error.msg} (column {error.colno})") from error
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, absurd numbers, nested too deeply
        raise NeVAError(f"cannot be read ({error}); expected a value system as {suffix[1:].upper()} text") from error


def _load_yaml(text: str) -> Any:
    try:
        import yaml  # here only: nobody who keeps to JSON needs it
    except ImportError as error:
        raise NeVAError("reading YAML needs PyYAML: `pip install pyyaml`, or write the same as .json") from error

    class UniqueKeyLoader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            _check_unique(f"the mapping at line {node.start_mark.line + 1}", [str(key.value) for key, _ in node.value])
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark else "the text"
        raise NeVAError(f"{where} is not valid YAML: {getattr(error, 'problem', None) or error}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _check_unique("a JSON object", [key for key, _ in pairs])  # json itself would keep the last one silently
    return dict(pairs)


def _checked_values(values: Sequence[Value]) -> tuple[Value, ...]:
    if not 1 <= len(values) <= MAX_VALUES:
        raise NeVAError(f"values has {len(values)} entries; expected 1 to {MAX_VALUES}")
    _check_unique("values", [value.name for value in values])
    bare = [value.name for value in values if value.angle is None]
    if 0 < len(bare) < len(values):
        raise NeVAError(f"angle is missing for {', '.join(bare)}; expected an angle for every value or for none")
    return tuple(values)


def _checked_groups(given: Any, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    groups = {}
    for group, listed in _as_mapping("groups", given).items():
        _check_name("a name in groups", group)
        members = groups[group] = _as_list(f"groups.{group}", listed)
        if not members:
            raise NeVAError(f"groups.{group} is empty; expected at least one value, or no such group")
        for member in members:
            if member not in names:
                raise NeVAError(f"groups.{group}: value {_unknown(member, names)}")
        _check_unique(f"groups.{group}", members)
    return groups


def _checked_opposites(given: Any, groups: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    opposites = dict(_as_mapping("opposite_groups", given))
    for group, other in tuple(opposites.items()):
        for name in (group, other):
            if name not in tuple(groups):
                raise NeVAError(f"opposite_groups: group {_unknown(name, groups)}")
        if opposites.setdefault(other, group) != group:
            raise NeVAError(f"opposite_groups gives {other} more than one opposite; expected one group for each")
        if set(groups[group]) & set(groups[other]):
            raise NeVAError(f"opposite_groups: {group} and {other} share a value; expected none in common")
    return opposites


def _check_keys(what: str, data: Any, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    for key in _as_mapping(what, data):
        if key not in required + optional:
            raise NeVAError(f"key {_unknown(key, required + optional)}")
    if missing := [key for key in required if key not in data]:
        raise NeVAError(f"key {missing[0]!r} is missing; expected {', '.join(required)}")


def _check_name(what: str, name: Any) -> None:
    fits = isinstance(name, str) and _NAME.fullmatch(name) is not None
    _check(fits, what, name, "a small letter, then at most 63 small letters, digits and _, like self_direction")


def _check_text(what: str, text: Any) -> None:
    _check(isinstance(text, str) and bool(text.strip()), what, text, "text that is not empty")


def _check_size(raw: bytes) -> None:
    if len(raw) > MAX_FILE_BYTES:
        raise NeVAError(f"the file is larger than {MAX_FILE_BYTES} bytes (1 MiB), the limit; shorten the texts")


def _check_unique(what: str, items: Iterable[str]) -> None:
    twice = [item for item, count in Counter(items).items() if count > 1]
    if twice:
        raise NeVAError(f"{what} has {_show(twice[0])} more than once; expected it once")


def _as_list(what: str, items: Any) -> tuple[Any, ...]:
    _check(isinstance(items, (list, tuple)), what, items, "a list")
    return tuple(items)


def _as_mapping(what: str, items: Any) -> Mapping[Any, Any]:
    _check(isinstance(items, Mapping), what, items, "a mapping of names")
    return items


def _check(fits: bool, what: str, given: Any, expected: str) -> None:
    if not fits:
        raise NeVAError(f"{what} is {_show(given)}; expected {expected}")


def _unknown(name: Any, known: Iterable[str]) -> str:
    spelled = re.sub(r"[\s-]+", "_", name[:99].lower()) if isinstance(name, str) else ""  # finds Self-Direction too
    close = difflib.get_close_matches(spelled, list(known), 1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{_show(name)} is unknown{hint}; expected one of {', '.join(known)}"


def _show(given: Any) -> str:
    # A file may hold any amount of anything: long texts are cut, containers named by their kind alone.
    shown = repr(given) if given is None or isinstance(given, (str, int, float)) else f"a {type(given).__name__}"
    return shown if len(shown) <= 200 else f"{shown[:200]}..."
