"""Presets and links of the Space."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl

import pytest
from hypothesis import given
from hypothesis import strategies as some

from neva_hf import load_value_system
from neva_hf.space.state import MAX_SEED, PRESETS, QUESTIONS, Link, from_link, presets_for, to_link

SCHWARTZ = load_value_system("schwartz10")
VALUES = list(SCHWARTZ.names)


def opened(link: str, **options: Any) -> Link:
    return from_link(dict(parse_qsl(link)), VALUES, **options)


@given(
    dials=some.dictionaries(some.sampled_from(VALUES), some.integers(-40, 40).map(lambda tenths: tenths / 10)),
    question=some.text(max_size=60).map(lambda text: "".join(sign for sign in text if sign.isprintable()).strip()),
    seed=some.integers(0, MAX_SEED),
    temperature=some.sampled_from([0.0, 0.7, 2.0]),
    gate=some.booleans(),
    map=some.sampled_from(["", "user/neva-map"]),
)
def test_a_link_brings_back_what_was_set(
    dials: dict[str, float], question: str, seed: int, temperature: float, gate: bool, map: str
) -> None:
    link = to_link(dials, question, seed, temperature=temperature, gate=gate, map=map)
    turned = {name: strength for name, strength in dials.items() if strength}
    assert opened(link) == Link(turned, question, seed, temperature, gate, map, ())
    assert link.isascii()
    assert not set(link) & set(" \"'<>\n")


@given(some.dictionaries(some.sampled_from(["dials", "q", "seed", "t", "gate", "map", "x"]), some.text(max_size=80)))
def test_rubbish_never_raises_and_gives_nothing_that_the_engine_refuses(query: dict[str, str]) -> None:
    found = from_link(query, VALUES, reach=4.0)
    assert set(found.dials) <= set(VALUES)
    assert all(0 < abs(strength) <= 4 for strength in found.dials.values())
    assert 0 <= found.seed <= MAX_SEED
    assert 0 <= found.temperature <= 2


RUBBISH = [
    ("dials=luck:1", "none of this map's"),
    ("dials=power:much", "set to no number"),
    ("dials=power:nan", "set to no number"),
    ("dials=power:1e400", "set to no number"),
    ("dials=power:" + "9" * 100_000, "set to no number"),
    ("dials=power:9", "Dials go from -4 to 4"),
    ("q=" + "a" * 2001, "too long and is cut"),
    ("seed=-1", "The seed in the link"),
    ("seed=1.5", "The seed in the link"),
    ("seed=99999999999", "The seed in the link"),
    ("t=3", "The temperature in the link"),
    ("map=/etc/passwd", "The map in the link"),
    ("map=../user/map", "The map in the link"),
    ("map=<script>", "The map in the link"),
]


@pytest.mark.parametrize(("link", "sentence"), RUBBISH)
def test_what_a_link_cannot_bring_is_said_without_repeating_it(link: str, sentence: str) -> None:
    (note,) = opened(link).notes
    assert sentence in note
    assert "script" not in note


def test_parts_that_are_no_text_are_nothing() -> None:
    assert from_link({"dials": ["power:1"], "q": None, "seed": 3}, VALUES) == Link()  # type: ignore[dict-item]


def test_what_is_sound_in_a_link_is_used_beside_what_is_not() -> None:
    found = opened("dials=luck:1,power:0.5,security:x&q=Why%3F&seed=3")
    assert (found.dials, found.question, found.seed) == ({"power": 0.5}, "Why?", 3)


def test_presets_turn_down_only_what_is_opposite_to_what_they_turn_up() -> None:
    assert len({preset.key for preset in PRESETS}) == len({preset.name for preset in PRESETS}) == len(PRESETS) >= 6
    for preset in PRESETS:
        main = max(preset.dials, key=lambda name: preset.dials[name])
        for name, strength in preset.dials.items():
            if strength < 0:
                assert SCHWARTZ.relation(main, name) == "opposite", preset.key
            elif name != main:
                assert SCHWARTZ.relation(main, name) in ("within", "adjacent"), preset.key


def test_presets_cost_about_as_much_as_one_dial_at_one_and_a_half() -> None:
    for preset in PRESETS:
        assert 1.25**2 < sum(strength**2 for strength in preset.dials.values()) < 1.75**2, preset.key


def test_every_value_of_the_circle_leads_a_preset_or_joins_one() -> None:
    assert {name for preset in PRESETS for name in preset.dials} == set(VALUES)


def test_other_value_systems_have_no_presets() -> None:
    assert presets_for(VALUES) == PRESETS
    assert presets_for(list(load_value_system("big_five").names)) == []
    assert presets_for(VALUES[:5]) == []


def test_presets_stay_within_the_fluent_ranges() -> None:
    ranges = dict.fromkeys(VALUES, (-0.2, 1.0))
    for preset in presets_for(VALUES, ranges):
        assert all(-0.2 <= strength <= 1.0 for strength in preset.dials.values())


def test_questions_are_short_and_each_stands_once() -> None:
    assert len(set(QUESTIONS)) == len(QUESTIONS) >= 5
    assert all(len(question) < 120 for question in QUESTIONS)
