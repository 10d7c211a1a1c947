"""The sweep and the blind test of the Space."""

from __future__ import annotations

from itertools import pairwise

import pytest
from space_tools import idle, last, tiny_engine

from neva_hf import NeVAError
from neva_hf.space import sweep

QUESTION = "What now?"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sweep_gives_each_strength_what_it_gives_alone(temperature: float) -> None:
    engine, options = tiny_engine(), {"seed": 3, "max_new_tokens": 10, "temperature": temperature}
    strengths = sweep.five(engine, "power")
    texts = last(sweep.stream(engine, QUESTION, "power", strengths, **options))
    alone = [last(engine.stream([], QUESTION, {"power": strength}, **options)) for strength in strengths]
    assert texts == [turn.edited for turn in alone]
    assert texts[2] == alone[0].base
    assert len(set(texts)) == 5


def test_the_other_dials_of_a_sweep_stay_where_they_are() -> None:
    engine = tiny_engine()
    (text,) = last(sweep.stream(engine, QUESTION, "power", [1.0], max_new_tokens=10, others={"security": 2.0}))
    both = last(engine.stream([], QUESTION, {"power": 1.0, "security": 2.0}, max_new_tokens=10))
    assert text == both.edited


def test_a_sweep_grows_and_can_be_closed() -> None:
    engine = tiny_engine()
    texts = list(sweep.stream(engine, QUESTION, "power", [-1.0, 1.0], max_new_tokens=10))
    assert all(len(row) == 2 for row in texts)
    assert len(texts[0][0]) <= len(texts[-1][0])
    reading = sweep.stream(engine, QUESTION, "power", [1.0], max_new_tokens=200)
    next(reading)
    reading.close()  # type: ignore[attr-defined]
    idle(engine)
    assert engine.busy == 0


def test_five_strengths_span_the_fluent_range() -> None:
    engine = tiny_engine(ranges={"power": [-2.5, 1.0]})
    assert sweep.five(engine, "power") == [-2.5, -1.25, 0.0, 0.5, 1.0]


@pytest.mark.parametrize("strengths", [[], [0.1] * 9])
def test_a_sweep_has_at_least_one_row_and_not_too_many(strengths: list[float]) -> None:
    with pytest.raises(NeVAError, match="1 to 8 answers"):
        sweep.stream(tiny_engine(), QUESTION, "power", strengths)


def test_a_sweep_of_no_value_is_refused() -> None:
    engine = tiny_engine()
    with pytest.raises(NeVAError, match="no value 'luck'"):
        sweep.stream(engine, QUESTION, "luck", [1.0])
    with pytest.raises(NeVAError, match="Choose a value"):
        sweep.five(engine, "luck")


def test_a_blind_test_is_a_coin_that_falls_the_same_for_the_same_seed() -> None:
    sides = [sweep.blind(seed) for seed in range(400)]
    assert sides == [sweep.blind(seed) for seed in range(400)]
    assert 150 < sum(sides) < 250
    # Neither odd seeds nor neighbours tell.
    assert 60 < sum(sides[1::2]) < 140
    assert 150 < sum(one == other for one, other in pairwise(sides)) < 250
