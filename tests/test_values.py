from __future__ import annotations

import ast
import copy
import dataclasses
import doctest
import inspect
import json
import math
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from neva_hf import value_parts
from neva_hf import values as values_module
from neva_hf.errors import NeVAError
from neva_hf.values import (
    MAX_FILE_BYTES,
    MAX_VALUES,
    Value,
    ValueSystem,
    available_value_systems,
    load_value_system,
    save_value_system,
)

TEN = (
    "self_direction",
    "stimulation",
    "hedonism",
    "achievement",
    "power",
    "security",
    "conformity",
    "tradition",
    "benevolence",
    "universalism",
)
NINETEEN = (
    "self_direction_thought",
    "self_direction_action",
    "stimulation",
    "hedonism",
    "achievement",
    "power_dominance",
    "power_resources",
    "face",
    "security_personal",
    "security_societal",
    "tradition",
    "conformity_rules",
    "conformity_interpersonal",
    "humility",
    "benevolence_dependability",
    "benevolence_caring",
    "universalism_concern",
    "universalism_nature",
    "universalism_tolerance",
)
CIRCLES = {"schwartz10": TEN, "schwartz19": NINETEEN}

BIG_FIVE_YAML = """\
name: my_traits
label: My five traits
description: How a character in my game may differ from the others.
values:
  - {name: openness, label: Openness, definition: Likes what is new.}
  - {name: conscientiousness, label: Conscientiousness, definition: Finishes what was begun.}
  - {name: extraversion, label: Extraversion, definition: Likes company.}
  - {name: agreeableness, label: Agreeableness, definition: Likes to get along.}
  - {name: neuroticism, label: Neuroticism, definition: Worries easily.}
groups:
  plasticity: [openness, extraversion]
  stability: [conscientiousness, agreeableness, neuroticism]
"""


@pytest.fixture
def ten() -> ValueSystem:
    return load_value_system("schwartz10")


def make(angles: dict[str, float | None], **fields: Any) -> ValueSystem:
    values = tuple(Value(name, name.upper(), f"Living by {name}.", angle) for name, angle in angles.items())
    return ValueSystem("made", "Made", "Made for a test.", values, **fields)


def good_data() -> dict[str, Any]:
    """A small system as plain data, to be spoiled by one change at a time."""
    names = ("north", "east", "south", "west")
    return {
        "name": "compass",
        "label": "Compass",
        "description": "Four directions.",
        "values": [
            {"name": name, "label": name.upper(), "definition": f"Going {name}.", "angle": 90 * i}
            for i, name in enumerate(names)
        ],
        "groups": {"up": ["north", "east"], "down": ["south", "west"]},
        "opposite_groups": {"up": "down"},
    }


def pairs(system: ValueSystem) -> list[tuple[str, str]]:
    return [(a, b) for a in system.names for b in system.names]


# What is shipped.


def test_three_systems_are_shipped_and_schwartz_ten_is_the_default() -> None:
    assert available_value_systems() == ["big_five", "schwartz10", "schwartz19"]
    assert load_value_system() == load_value_system("schwartz10")


@pytest.mark.parametrize("name", available_value_systems())
def test_a_shipped_system_is_named_like_its_file_and_says_what_it_means_and_whom_to_cite(name: str) -> None:
    system = load_value_system(name)
    assert system.name == name
    assert re.search(r"\(\d{4}\).*https://doi\.org/", system.source)
    assert all(value.label and value.definition.endswith(".") for value in system)
    assert len({value.definition for value in system}) == len(system)


def test_package_data_takes_the_json_files_along() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert '"**/*.json"' in text


@pytest.mark.parametrize("name", CIRCLES)
def test_the_schwartz_values_stand_in_circle_order_with_equal_steps(name: str) -> None:
    system, step = load_value_system(name), 360 / len(CIRCLES[name])
    assert system.names == CIRCLES[name]
    assert [value.angle for value in system] == pytest.approx([i * step for i in range(len(system))], abs=1e-4)


def test_the_ten_values_are_36_degrees_apart(ten: ValueSystem) -> None:
    assert [value.angle for value in ten] == [36 * i for i in range(10)]


@pytest.mark.parametrize("name", CIRCLES)
def test_the_four_groups_lie_across_from_their_opposites(name: str) -> None:
    system = load_value_system(name)
    assert dict(system.opposite_groups) == {
        "openness_to_change": "conservation",
        "conservation": "openness_to_change",
        "self_enhancement": "self_transcendence",
        "self_transcendence": "self_enhancement",
    }
    # Each group is an unbroken arc of the circle, and the four arcs cover it.
    for members in system.groups.values():
        places = [system.names.index(member) for member in members]
        assert places == list(range(places[0], places[0] + len(places)))
    assert {member for members in system.groups.values() for member in members} == set(system.names)


def test_values_on_a_border_are_in_both_groups(ten: ValueSystem) -> None:
    refined = load_value_system("schwartz19")
    assert [name for name in ten.names if len(ten.groups_of(name)) == 2] == ["hedonism"]
    assert {name: refined.groups_of(name) for name in refined.names if len(refined.groups_of(name)) == 2} == {
        "hedonism": ("openness_to_change", "self_enhancement"),
        "face": ("self_enhancement", "conservation"),
        "humility": ("conservation", "self_transcendence"),
    }


def test_the_shipped_big_five_has_five_traits_and_no_circle() -> None:
    system = load_value_system("big_five")
    assert len(system) == 5
    assert not system.has_circle
    assert {system.relation(a, b) for a, b in pairs(system)} == {"same", "other"}
    assert system.opposites("openness") == ()


# A system as a collection.


def test_a_system_is_a_collection_of_its_values(ten: ValueSystem) -> None:
    assert len(ten) == 10
    assert tuple(value.name for value in ten) == ten.names
    assert all(value in ten and value.name in ten and ten[value.name] is value for value in ten)
    assert "Power" not in ten
    assert None not in ten
    assert dataclasses.replace(ten["power"], angle=1.0) not in ten


def test_systems_and_values_are_frozen_hashable_and_can_be_copied_and_pickled(ten: ValueSystem) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ten.name = "other"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        ten["power"].angle = 1.0  # type: ignore[misc]
    assert hash(ten) == hash(load_value_system("schwartz10"))
    assert pickle.loads(pickle.dumps(ten)) == copy.deepcopy(ten) == ten


def test_a_system_does_not_change_with_the_data_it_was_made_from() -> None:
    data = good_data()
    system = ValueSystem.from_dict(data)
    data["groups"]["up"].append("west")
    data["opposite_groups"].clear()
    assert system == ValueSystem.from_dict(good_data())


@pytest.mark.parametrize(
    ("given", "meant"),
    [("benevolense", "benevolence"), ("Self-Direction", "self_direction"), ("self direction", "self_direction")],
)
def test_an_unknown_name_lists_the_names_and_the_closest_one(ten: ValueSystem, given: str, meant: str) -> None:
    with pytest.raises(NeVAError) as caught:
        ten[given]
    message = str(caught.value)
    assert repr(given) in message
    assert f"did you mean {meant!r}?" in message
    assert all(name in message for name in ten.names)


def test_a_name_like_no_other_gets_no_guess(ten: ValueSystem) -> None:
    with pytest.raises(NeVAError, match="'qqqq' is unknown; expected one of self_direction"):
        ten["qqqq"]
    with pytest.raises(NeVAError, match="3 is unknown"):
        ten[3]  # type: ignore[index]


@pytest.mark.parametrize("ask", ["groups_of", "neighbours", "opposites"])
def test_every_question_about_an_unknown_value_is_refused(ten: ValueSystem, ask: str) -> None:
    with pytest.raises(NeVAError, match="did you mean 'power'"):
        getattr(ten, ask)("powr")


@pytest.mark.parametrize("ask", ["distance", "relation"])
def test_every_question_about_a_pair_with_an_unknown_value_is_refused(ten: ValueSystem, ask: str) -> None:
    for pair in (("powr", "power"), ("power", "powr"), ("powr", "powr")):
        with pytest.raises(NeVAError, match="did you mean 'power'"):
            getattr(ten, ask)(*pair)


# The circle.


@pytest.mark.parametrize("name", CIRCLES)
def test_distance_is_symmetric_and_between_0_and_180_degrees(name: str) -> None:
    system = load_value_system(name)
    for a, b in pairs(system):
        assert 0 <= system.distance(a, b) == system.distance(b, a) <= 180
        assert (system.distance(a, b) == 0) == (a == b)


def test_distance_goes_the_short_way_around() -> None:
    system = make({"a": 10, "b": 350, "c": 190})
    assert system.distance("a", "b") == 20
    assert system.distance("a", "c") == 180
    assert system.distance("b", "c") == 160


@pytest.mark.parametrize("name", CIRCLES)
def test_neighbours_are_the_ones_before_and_after_on_the_circle(name: str) -> None:
    system, order = load_value_system(name), CIRCLES[name]
    for i, value in enumerate(order):
        assert system.neighbours(value) == (order[i - 1], order[(i + 1) % len(order)])


def test_neighbours_do_not_depend_on_the_order_of_the_values() -> None:
    system = make({"c": 200, "a": 0, "d": 300, "b": 100})
    assert system.neighbours("a") == ("d", "b")
    assert system.neighbours("c") == ("b", "d")


def test_values_that_share_an_angle_are_neighbours_of_each_other_and_of_the_same_outer_ones() -> None:
    system = make({"security": 180, "conformity": 220, "tradition": 220, "benevolence": 270, "power": 20})
    assert system.neighbours("conformity") == ("security", "tradition", "benevolence")
    assert system.neighbours("tradition") == ("security", "conformity", "benevolence")
    assert system.neighbours("security") == ("power", "conformity", "tradition")
    assert system.neighbours("benevolence") == ("conformity", "tradition", "power")


def test_small_circles_name_no_neighbour_twice() -> None:
    assert make({"a": 5}).neighbours("a") == ()
    assert make({"a": 5, "b": 90}).neighbours("a") == ("b",)
    assert make({"a": 5, "b": 5}).neighbours("a") == ("b",)


@pytest.mark.parametrize("ask", ["neighbours", "distance"])
def test_a_system_without_a_circle_says_so(ask: str) -> None:
    system = load_value_system("big_five")
    names = ("openness",) if ask == "neighbours" else ("openness", "neuroticism")
    with pytest.raises(NeVAError, match=r"big_five has no circle.*give each value an angle"):
        getattr(system, ask)(*names)


# Relations.


@pytest.mark.parametrize("name", available_value_systems())
def test_a_relation_is_the_same_from_either_side(name: str) -> None:
    system = load_value_system(name)
    for a, b in pairs(system):
        assert system.relation(a, b) == system.relation(b, a)
        assert (system.relation(a, b) == "same") == (a == b)
        assert (b in system.opposites(a)) == (a in system.opposites(b)) == (system.relation(a, b) == "opposite")


@pytest.mark.parametrize(
    ("a", "b", "relation"),
    [
        ("power", "power", "same"),
        ("power", "achievement", "within"),
        ("hedonism", "stimulation", "within"),
        ("hedonism", "power", "within"),
        ("power", "security", "adjacent"),
        ("self_direction", "power", "adjacent"),
        ("self_direction", "universalism", "adjacent"),
        ("tradition", "benevolence", "adjacent"),
        ("self_direction", "security", "opposite"),
        ("self_direction", "tradition", "opposite"),
        ("power", "universalism", "opposite"),
        ("achievement", "benevolence", "opposite"),
        # On a border: opposite through one of its groups only, so the circle decides.
        ("hedonism", "tradition", "opposite"),
        ("hedonism", "benevolence", "opposite"),
        ("hedonism", "security", "adjacent"),
        ("hedonism", "universalism", "adjacent"),
    ],
)
def test_relations_follow_the_groups_of_the_ten_values(ten: ValueSystem, a: str, b: str, relation: str) -> None:
    assert ten.relation(a, b) == relation


def test_opposites_come_from_the_group_across_with_the_farthest_first(ten: ValueSystem) -> None:
    assert ten.opposites("self_direction") == ("security", "conformity", "tradition")
    assert ten.opposites("hedonism") == ("tradition", "conformity", "benevolence")
    assert ten.opposites("power") == ("universalism", "benevolence")
    assert ten.opposites("conformity") == ("stimulation", "self_direction", "hedonism")


@pytest.mark.parametrize("name", CIRCLES)
def test_every_schwartz_value_meets_all_four_relations_and_never_an_opposite_neighbour(name: str) -> None:
    system = load_value_system(name)
    for a in system.names:
        assert {system.relation(a, b) for b in system.names} == {"same", "within", "adjacent", "opposite"}
        assert {system.relation(a, b) for b in system.neighbours(a)} <= {"within", "adjacent"}
        assert system.distance(a, system.opposites(a)[0]) >= 135


def test_refined_values_on_a_border_are_opposite_to_what_lies_across_only() -> None:
    system = load_value_system("schwartz19")
    assert system.relation("face", "self_direction_thought") == "adjacent"
    assert system.relation("face", "universalism_concern") == "opposite"
    assert system.relation("face", "humility") == "within"
    assert system.relation("humility", "achievement") == "opposite"
    assert system.relation("humility", "hedonism") == "opposite"


def test_a_circle_without_groups_decides_relations_alone() -> None:
    system = make({"a": 0, "b": 90, "c": 135, "d": 180})
    assert [system.relation("a", other) for other in "bcd"] == ["adjacent", "opposite", "opposite"]
    assert system.opposites("a") == ("d", "c")


def test_groups_without_a_circle_decide_relations_alone() -> None:
    angles: dict[str, float | None] = dict.fromkeys("abcdx")
    groups = {"g": ("a", "b"), "h": ("b", "c"), "k": ("d",)}
    system = make(angles, groups=groups, opposite_groups={"g": "k"})
    assert system.relation("a", "b") == "within"
    assert system.relation("a", "d") == "opposite"
    assert system.relation("b", "d") == "opposite"  # through one of its two groups, and no circle to weigh it
    assert system.relation("a", "c") == "adjacent"
    assert system.relation("a", "x") == "other"  # x is in no group
    assert system.opposites("d") == ("a", "b")
    assert make(angles, groups=groups).relation("a", "c") == "other"  # nothing says how the groups stand


# Round trips and files.


@pytest.mark.parametrize("name", available_value_systems())
def test_a_system_survives_the_way_through_a_dict_and_through_a_file(name: str, tmp_path: Path) -> None:
    system = load_value_system(name)
    data = system.to_dict()
    assert ValueSystem.from_dict(data) == system
    assert ValueSystem.from_dict(json.loads(json.dumps(data))) == system
    save_value_system(system, tmp_path / "copy.json")
    assert load_value_system(tmp_path / "copy.json") == system
    assert load_value_system(str(tmp_path / "copy.json")).to_dict() == data


def test_letters_of_every_language_survive_a_file(tmp_path: Path) -> None:
    system = make({"a": None})
    system = dataclasses.replace(system, label="Großzügigkeit 仁", source="Lönnqvist (2012)")
    save_value_system(system, tmp_path / "a.json")
    assert "Großzügigkeit 仁" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert load_value_system(tmp_path / "a.json") == system


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".YAML"])
def test_a_user_brings_the_big_five_as_yaml(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"traits{suffix}"
    path.write_text(BIG_FIVE_YAML, encoding="utf-8")
    system = load_value_system(path)
    assert len(system) == 5
    assert system["openness"].definition == "Likes what is new."
    assert system.relation("openness", "extraversion") == "within"
    assert system.relation("openness", "neuroticism") == "other"
    assert system.source == ""


def test_a_single_trait_is_a_system(tmp_path: Path) -> None:
    system = ValueSystem("one", "One", "One trait.", (Value("extraversion", "Extraversion", "Being outgoing."),))
    save_value_system(system, tmp_path / "one.json")
    assert load_value_system(tmp_path / "one.json").names == ("extraversion",)
    assert system.opposites("extraversion") == ()
    assert system.relation("extraversion", "extraversion") == "same"


def test_a_shipped_name_wins_over_a_file_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "schwartz10").write_text("not a value system", encoding="utf-8")
    assert load_value_system("schwartz10").names == TEN


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(good_data()), encoding="utf-8-sig")
    assert load_value_system(tmp_path / "a.json") == ValueSystem.from_dict(good_data())


def test_saving_takes_json_paths_only(tmp_path: Path) -> None:
    with pytest.raises(NeVAError, match=r"expected a path that ends in \.json"):
        save_value_system(load_value_system(), tmp_path / "a.yaml")
    assert list(tmp_path.iterdir()) == []


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path: Path) -> None:
    system = dataclasses.replace(load_value_system(), description="x" * MAX_FILE_BYTES)
    with pytest.raises(NeVAError, match="1 MiB"):
        save_value_system(system, tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


# Errors: what is wrong with the data.


def spoil(data: dict[str, Any], path: tuple[Any, ...], new: Any) -> dict[str, Any]:
    """Set (or, with `...`, delete) what lies at `path` in the data."""
    *way, last = path
    inner: Any = data
    for step in way:
        inner = inner[step]
    if new is ...:
        del inner[last]
    else:
        inner[last] = new
    return data


BAD_FIELDS: list[tuple[tuple[Any, ...], Any, str]] = [
    # unknown and missing keys
    (("lable",), "x", r"key 'lable' is unknown \(did you mean 'label'\?\); expected one of name, label, description"),
    (("values", 1, "angel"), 3, r"values\[1\]: key 'angel' is unknown \(did you mean 'angle'\?\)"),
    (("name",), ..., "key 'name' is missing; expected name, label, description, values"),
    (("values",), ..., "key 'values' is missing"),
    (("values", 2, "definition"), ..., r"values\[2\]: key 'definition' is missing; expected name, label, definition"),
    # names
    (("name",), "Compass", "name is 'Compass'; expected a small letter, then at most 63"),
    (("values", 0, "name"), "North", r"values\[0\]: name is 'North'"),
    (("values", 0, "name"), "n-1", r"values\[0\]: name is 'n-1'"),
    (("values", 0, "name"), "1n", r"values\[0\]: name is '1n'"),
    (("values", 0, "name"), "", r"values\[0\]: name is ''"),
    (("values", 0, "name"), "north\n", r"values\[0\]: name is 'north\\n'"),
    (("values", 0, "name"), "é", r"values\[0\]: name is 'é'"),
    (("values", 0, "name"), "n" * 65, r"values\[0\]: name is 'nnn"),
    (("values", 0, "name"), True, r"values\[0\]: name is True"),
    # texts
    (("label",), "", "label is ''; expected text that is not empty"),
    (("description",), None, "description is None; expected text"),
    (("source",), ["a"], "source is a list; expected text"),
    (("source",), "  ", "source is '  '; expected text"),
    (("values", 3, "definition"), " \n", r"values\[3\]: definition is ' \\n'; expected text that is not empty"),
    (("values", 3, "definition"), 7, r"values\[3\]: definition is 7; expected text"),
    (("values", 3, "label"), None, r"values\[3\]: label is None; expected text"),
    # angles
    (("values", 1, "angle"), "90", r"values\[1\]: angle is '90'; expected degrees as a number, 0 <= angle < 360"),
    (("values", 1, "angle"), True, r"values\[1\]: angle is True; expected degrees"),
    (("values", 1, "angle"), [90], r"values\[1\]: angle is a list; expected degrees"),
    (("values", 1, "angle"), 360, r"values\[1\]: angle is 360; expected degrees"),
    (("values", 1, "angle"), -0.5, r"values\[1\]: angle is -0.5; expected degrees"),
    (("values", 1, "angle"), math.nan, r"values\[1\]: angle is nan; expected degrees"),
    (("values", 1, "angle"), math.inf, r"values\[1\]: angle is inf; expected degrees"),
    (("values", 1, "angle"), ..., "angle is missing for east; expected an angle for every value or for none"),
    (("values", 1, "angle"), None, "angle is missing for east"),
    # values as a whole
    (("values",), [], "values has 0 entries; expected 1 to 256"),
    (("values",), {"north": 1}, "values is a dict; expected a list"),
    (("values",), "north", "values is 'north'; expected a list"),
    (("values", 1), "east", r"values\[1\]: the entry is 'east'; expected a mapping"),
    (("values", 1, "name"), "north", "values has 'north' more than once"),
    # groups
    (("groups",), ["up"], "groups is a list; expected a mapping"),
    (("groups",), None, "groups is None; expected a mapping"),
    (("groups", "Up"), ["north"], "a name in groups is 'Up'"),
    (("groups", "up"), [], "groups.up is empty; expected at least one value"),
    (("groups", "up"), "north", "groups.up is 'north'; expected a list"),
    (
        ("groups", "up"),
        ["nort"],
        r"groups.up: value 'nort' is unknown \(did you mean 'north'\?\); expected one of north",
    ),
    (("groups", "up"), [["north"]], "groups.up: value a list is unknown"),
    (("groups", "up"), ["north", "north"], "groups.up has 'north' more than once"),
    # opposite groups
    (("opposite_groups",), ["up"], "opposite_groups is a list; expected a mapping"),
    (("opposite_groups", "up"), "dwn", r"opposite_groups: group 'dwn' is unknown \(did you mean 'down'\?\)"),
    (("opposite_groups", "side"), "down", "opposite_groups: group 'side' is unknown"),
    (("opposite_groups", "up"), ["down"], "opposite_groups: group a list is unknown"),
    (("opposite_groups", "up"), "up", "opposite_groups: up and up share a value"),
    (("groups", "down"), ["east", "south"], "opposite_groups: up and down share a value"),
]


@pytest.mark.parametrize(("path", "new", "message"), BAD_FIELDS)
def test_a_bad_field_is_named_with_what_was_expected(path: tuple[Any, ...], new: Any, message: str) -> None:
    ValueSystem.from_dict(good_data())  # it is the one change that is refused
    with pytest.raises(NeVAError, match=f"^{message}"):
        ValueSystem.from_dict(spoil(good_data(), path, new))


def test_a_group_has_one_opposite_only() -> None:
    data = good_data()
    data["groups"] = {"up": ["north"], "side": ["east"], "down": ["south"]}
    data["opposite_groups"] = {"up": "down", "side": "down"}
    with pytest.raises(NeVAError, match="opposite_groups gives down more than one opposite"):
        ValueSystem.from_dict(data)


def test_a_system_has_at_most_256_values() -> None:
    assert len(make({f"v{i}": None for i in range(MAX_VALUES)})) == 256
    with pytest.raises(NeVAError, match="values has 257 entries; expected 1 to 256"):
        make({f"v{i}": None for i in range(MAX_VALUES + 1)})


def test_systems_made_by_hand_are_checked_too() -> None:
    with pytest.raises(NeVAError, match="an entry of values is 'power'; expected a Value"):
        ValueSystem("made", "Made", "Made.", ("power",))  # type: ignore[arg-type]
    with pytest.raises(NeVAError, match="values is a Value; expected a list"):
        ValueSystem("made", "Made", "Made.", Value("a", "A", "A."))  # type: ignore[arg-type]
    with pytest.raises(NeVAError, match="angle is 400; expected degrees"):
        Value("a", "A", "A.", 400)


@pytest.mark.parametrize("data", [[], "schwartz10", None, 3])
def test_a_file_that_holds_something_else_is_refused(data: Any) -> None:
    with pytest.raises(NeVAError, match=r"^the value system is .*; expected a mapping"):
        ValueSystem.from_dict(data)


# Errors: what is wrong with the file.


def test_errors_from_a_file_name_the_file_and_the_field(tmp_path: Path) -> None:
    path = tmp_path / "compass.json"
    path.write_text(json.dumps(spoil(good_data(), ("values", 2, "angle"), 400)), encoding="utf-8")
    with pytest.raises(NeVAError) as caught:
        load_value_system(path)
    assert str(caught.value).startswith(f"{path}: values[2]: angle is 400; expected degrees")


@pytest.mark.parametrize(
    ("file_name", "text", "message"),
    [
        ("a.json", '{\n"name": "a",\n"label": }', "line 3 is not valid JSON: "),
        ("a.json", "", "line 1 is not valid JSON: "),
        ("a.json", '{"name": "a", "name": "b"}', "a JSON object has 'name' more than once"),
        ("a.json", "[" * 100_000, "cannot be read"),
        ("a.json", "1" * 5000, "(cannot be read|the value system is)"),
        ("a.yaml", "name: a\nvalues: [1, 2\nlabel: b\n", r"line \d is not valid YAML: "),
        ("a.yaml", "name: a\n\tlabel: b\n", "line 2 is not valid YAML: "),
        ("a.yaml", "name: \x00\n", "the text is not valid YAML: "),
        ("a.yaml", "a: 1\nname: a\nname: b\n", "the mapping at line 1 has 'name' more than once"),
        ("a.yaml", "name: !!python/object/apply:os.getcwd []\n", r"line 1 is not valid YAML: "),
        ("a.yaml", "[" * 20_000, "cannot be read"),
        ("a.yaml", "", "the value system is None; expected a mapping"),
        ("a.yaml", "name: on\nlabel: a\ndescription: b\nvalues: []\n", "(name is True|values has 0)"),
        ("a.yaml", "1: a\n", "key 1 is unknown"),
        ("a.txt", "{}", r"the file's ending is '\.txt'; expected \.json, \.yaml or \.yml"),
        ("a", "{}", r"the file's ending is ''; expected"),
    ],
)
def test_a_file_that_cannot_be_understood_is_named_with_the_place(
    file_name: str, text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / file_name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(NeVAError, match=f"^{re.escape(str(path))}: {message}"):
        load_value_system(path)


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'{"name": "\xff"}')
    with pytest.raises(NeVAError, match=r"a\.json: cannot be read \(.*utf-8.*expected a value system as JSON text"):
        load_value_system(tmp_path / "a.json")


def test_yaml_that_refers_to_itself_a_million_times_is_refused_in_a_short_message(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 64)]
    (tmp_path / "a.yaml").write_text("\n".join([*lines, "values: *a63", "name: *a63"]), encoding="utf-8")
    with pytest.raises(NeVAError) as caught:
        load_value_system(tmp_path / "a.yaml")
    assert len(str(caught.value)) < 1000


def test_long_names_are_cut_in_messages() -> None:
    with pytest.raises(NeVAError) as caught:
        Value("x" * 100_000, "X", "X.")
    assert len(str(caught.value)) < 500


def test_files_up_to_one_mebibyte_are_read_and_larger_ones_are_not(tmp_path: Path) -> None:
    text = json.dumps(good_data())
    path = tmp_path / "a.json"
    path.write_text(text + " " * (MAX_FILE_BYTES - len(text)), encoding="utf-8")
    assert load_value_system(path).name == "compass"
    path.write_text(text + " " * (MAX_FILE_BYTES - len(text) + 1), encoding="utf-8")
    with pytest.raises(NeVAError, match=r"a\.json: the file is larger than 1048576 bytes \(1 MiB\)"):
        load_value_system(path)


@pytest.mark.parametrize("given", ["no_such_file.json", "folder", "", "x" * 5000, "a\x00b", None, 3])
def test_what_is_neither_a_shipped_name_nor_a_file_is_refused(
    given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(NeVAError, match=r"is unknown.*big_five, schwartz10, schwartz19, or the path of an existing"):
        load_value_system(given)


def test_a_misspelt_shipped_name_gets_the_right_one() -> None:
    with pytest.raises(NeVAError, match=r"'schwarz10' is unknown \(did you mean 'schwartz10'\?\)"):
        load_value_system("schwarz10")


def test_without_pyyaml_a_yaml_file_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "traits.yaml"
    path.write_text(BIG_FIVE_YAML, encoding="utf-8")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(NeVAError, match=r"traits\.yaml: .*pip install pyyaml"):
        load_value_system(path)
    assert load_value_system().names == TEN


# The module itself.


def test_the_modules_import_nothing_heavy() -> None:
    imported: set[str] = set()
    for module in (values_module, value_parts):
        tree = ast.parse(inspect.getsource(module))
        imported |= {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        imported |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
    outside = {name for name in imported if name.split(".")[0] not in sys.stdlib_module_names}
    assert outside == {"neva_hf.errors", "neva_hf.value_parts"}


def docstring_tests() -> list[doctest.DocTest]:
    # A closing fence would otherwise be taken for the last line of the expected output.
    parser = doctest.DocTestParser()
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [test for module in (values_module, value_parts) for test in finder.find(module)]
    texts = [(test, re.sub(r"(?m)^\s*```\w*$", "", test.docstring or "")) for test in found]
    return [parser.get_doctest(text, test.globs, test.name, test.filename, test.lineno) for test, text in texts]


@pytest.mark.parametrize("test", [t for t in docstring_tests() if t.examples], ids=lambda test: test.name)
def test_docstring_examples_run(test: doctest.DocTest) -> None:
    printed: list[str] = []
    result = doctest.DocTestRunner().run(test, out=printed.append)
    assert result.failed == 0, "".join(printed)


def test_everything_public_has_a_docstring_and_every_function_an_example() -> None:
    members = {f"{cls.__name__}.{key}": item for cls in (Value, ValueSystem) for key, item in vars(cls).items()}
    functions = {key: item for key, item in {**vars(values_module), **members}.items() if "._" not in key}
    public = {
        key: getattr(item, "__func__", item)
        for key, item in functions.items()
        if not key.startswith("_") and getattr(item, "__module__", values_module.__name__) == values_module.__name__
    }
    public["Value"] = Value
    tested = {test.name.split(".", 2)[2] for test in docstring_tests() if test.examples}
    for key, item in public.items():
        if inspect.isfunction(item) or inspect.isclass(item):
            assert key in tested, f"{key} has no example"
        elif isinstance(item, property):
            assert item.__doc__, f"{key} has no docstring"
