"""Dose curves are what slow computations give at each strength, and reading them goes along straight lines."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from statistics import mean
from typing import Any

import pytest
import reference
import torch
from tiny import SCENARIOS, TEXTS, VALUES, add_map, random_map, tiny_reader, tiny_tokenizer

from neva_hf import NeuronMap, NeVAError, NeVAModel, Scenario
from neva_hf.identify.dose import Expected, dose_curves, expected, leakage
from neva_hf.measure import damage

STRENGTHS = [-1.5, 0.5, 2.0]
TOKENIZER = tiny_tokenizer()

# `security` is no value of the map, but the scenarios hold it.
MAP_VALUES = ["power", "benevolence"]


def reader_with_map(values: list[str] = MAP_VALUES, **options: Any) -> tuple[NeVAModel, NeuronMap]:
    base = tiny_reader()
    neuron_map = random_map(base, values=values, **options)
    return neuron_map.apply_to(base), neuron_map


def measured(model: NeVAModel, **options: Any) -> dict[str, Any]:
    return dose_curves(model, TOKENIZER, SCENARIOS, TEXTS, **{"strengths": STRENGTHS, **options})


def slow_margins(neuron_map: NeuronMap, strengths: dict[str, float], observed: str, left_out: str) -> list[float]:
    found = []
    plain = tiny_reader()
    for scenario in SCENARIOS:
        with torch.no_grad(), reference.edited(plain, (neuron_map, strengths)):
            told = {key: float(one) for key, one in reference.log_probs(plain, TOKENIZER, scenario).items()}
        rivals = [one for key, one in told.items() if key not in (observed, left_out)]
        if observed in told and rivals:
            found.append(told[observed] - mean(rivals))
    return found


def test_curves_are_the_margins_and_damage_of_each_strength() -> None:
    model, neuron_map = reader_with_map()
    dose = measured(model)
    assert dose["strengths"] == STRENGTHS
    assert (dose["scenarios"], dose["texts"], list(dose["curves"])) == (len(SCENARIOS), len(TEXTS), MAP_VALUES)
    for target, curve in dose["curves"].items():
        assert sorted(curve["margins"]) == sorted(VALUES)
        for observed, points in curve["margins"].items():
            left_out = "" if observed == target else target
            base = slow_margins(neuron_map, {}, observed, left_out)
            for strength, got in zip(STRENGTHS, points, strict=True):
                edited = slow_margins(neuron_map, {target: strength}, observed, left_out)
                assert got == pytest.approx(mean(edited) - mean(base), abs=1e-4)
            assert max(map(abs, points)) > 0.01
        wanted = damage(model, TOKENIZER, TEXTS, [{target: strength} for strength in STRENGTHS])
        assert curve["kl"] == pytest.approx([one.kl for one in wanted], abs=1e-5)
        assert min(curve["kl"]) > 1e-3


def test_leakage_of_a_curve_is_that_of_its_margins() -> None:
    dose = measured(reader_with_map(seed=2)[0])
    seen = set()
    for target, curve in dose["curves"].items():
        for place, strength in enumerate(STRENGTHS):
            sign = math.copysign(1, strength)
            own = sign * curve["margins"][target][place]
            rises = [max(0.0, sign * points[place]) for name, points in curve["margins"].items() if name != target]
            if own > 0:
                assert curve["leakage"][place] == pytest.approx(mean(rises) / own, rel=0.02, abs=1e-3)
            else:
                assert curve["leakage"][place] is None
            seen.add(own > 0)
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("shifts", "sign", "wanted"),
    [
        ({"power": 0.4, "security": 0.2, "hedonism": -0.3}, 1, 0.25),
        ({"power": -0.4, "security": 0.2, "hedonism": -0.3}, -2, 0.375),
        ({"power": -0.1, "security": 0.2}, 1, None),
        ({"power": 0.0, "security": 0.2}, 1, None),
        ({"power": 0.3}, 1, 0.0),
    ],
)
def test_leakage_counts_what_moves_along_with_the_target(
    shifts: dict[str, float], sign: float, wanted: float | None
) -> None:
    assert leakage(shifts, "power", sign) == (None if wanted is None else pytest.approx(wanted))


def test_curves_neither_see_nor_change_what_is_set_on_the_model() -> None:
    model, _ = reader_with_map()
    wanted = measured(model)
    model.set_strengths(power=2.0)
    with model.strengths(benevolence=-1.0):
        assert measured(model) == wanted
    assert model.get_strengths() == {"power": 2.0, "benevolence": 0.0}


def test_curves_are_plain_data_that_a_map_can_be_saved_with(tmp_path: Any) -> None:
    model, neuron_map = reader_with_map()
    dose = measured(model)
    assert json.loads(json.dumps(dose, allow_nan=False)) == dose
    config = replace(neuron_map.config, measurements={"dose": dose})
    NeuronMap(config, neuron_map.modules).save_pretrained(tmp_path)
    assert NeuronMap.from_pretrained(tmp_path).config.measurements["dose"] == dose


def test_strengths_beyond_the_fluent_range_are_measured_without_a_warning() -> None:
    model, _ = reader_with_map()
    limited, _ = reader_with_map(ranges={"power": [-1.0, 0.1]})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert measured(limited) == measured(model)
    with pytest.warns(UserWarning, match="outside the range"):
        limited.set_strengths(power=2.0)


def test_strengths_are_sorted_and_given_once() -> None:
    model, _ = reader_with_map()
    assert measured(model, strengths=(2, 0.5, -1.5, 0.5)) == measured(model)


def test_what_is_not_finite_is_none_and_not_read() -> None:
    model, _ = reader_with_map()
    model.get_output_embeddings().weight.data *= 1e38
    dose = measured(model, strengths=[0.1, 1e6])
    json.dumps(dose, allow_nan=False)
    assert None in dose["curves"]["power"]["kl"]
    assert math.isfinite(expected(dose, "power", 1e6).kl)


def test_a_single_trait_is_measured_against_its_opposite() -> None:
    model, _ = reader_with_map(values=["power", "security"])
    traits = [
        Scenario("What now?", {"power": "take the lead", "-power": "let them"}),
        Scenario("Where to?", {"security": "home", "-security": "anywhere"}),
    ]
    dose = dose_curves(model, TOKENIZER, traits, TEXTS, strengths=[1.0])
    assert {target: sorted(curve["margins"]) for target, curve in dose["curves"].items()} == {
        "power": ["power", "security"],
        "security": ["power", "security"],
    }


def test_values_without_a_rival_besides_the_target_are_not_observed() -> None:
    model, _ = reader_with_map(values=["power"])
    dose = dose_curves(model, TOKENIZER, SCENARIOS[2:], TEXTS, strengths=[1.0])
    assert list(dose["curves"]["power"]["margins"]) == ["power"]
    assert dose["curves"]["power"]["leakage"][0] in (None, 0.0)


def test_progress_is_one_loop_over_all_that_is_run() -> None:
    seen: list[tuple[str, int]] = []

    def progress(items: Any, what: str) -> Any:
        seen.append((what, len(items)))
        return items

    model, _ = reader_with_map()
    # (a text of one token cannot be measured and is not counted)
    dose = dose_curves(model, TOKENIZER, SCENARIOS, [*TEXTS, "a"], strengths=[1.0, 2.0], progress=progress)
    assert seen == [("dose curves", len(SCENARIOS) * (1 + 2 * 2) + 2 * len(TEXTS))]
    assert dose["texts"] == len(TEXTS)


def test_what_cannot_be_measured_is_refused_before_the_pass() -> None:
    def never(items: Any, what: str) -> Any:
        raise AssertionError("the pass has begun")

    model, _ = reader_with_map(values=["power", "hedonism"])
    with pytest.raises(NeVAError, match="no reply of 'hedonism'"):
        measured(model, progress=never)
    model, neuron_map = reader_with_map()
    for wrong in ([], [0.0, 1.0], [math.nan], [math.inf], [1e9]):
        with pytest.raises(NeVAError, match="strengths"):
            measured(model, strengths=wrong, progress=never)
    with pytest.raises(NeVAError, match="fewer than two tokens"):
        dose_curves(model, TOKENIZER, SCENARIOS, ["a"], progress=never)
    add_map(model, neuron_map, "another")
    model.base_model.set_adapter(["default", "another"])
    with pytest.raises(NeVAError, match="one adapter"):
        measured(model, progress=never)


# Reading curves

DOSE = {
    "strengths": [-2.0, -1.0, 0.5, 1.0],
    "scenarios": 3,
    "texts": 2,
    "curves": {
        "power": {
            "kl": [0.2, 0.05, 0.01, 0.04],
            "leakage": [0.1, 0.1, None, 0.1],
            "margins": {"power": [-0.8, -0.5, 0.2, 0.6], "security": [0.1, 0.1, -0.1, None]},
        }
    },
}


@pytest.mark.parametrize(
    ("strength", "power", "security", "kl"),
    [
        (0, 0.0, 0.0, 0.0),
        (-2.0, -0.8, 0.1, 0.2),
        (1, 0.6, -0.1, 0.04),
        (0.25, 0.1, -0.05, 0.005),
        (0.75, 0.4, -0.1, 0.025),
        (-0.5, -0.25, 0.05, 0.025),
        (-1.5, -0.65, 0.1, 0.125),
        (9.0, 0.6, -0.1, 0.04),
        (-9.0, -0.8, 0.1, 0.2),
    ],
)
def test_reading_goes_along_straight_lines_through_zero_and_stops_at_the_ends(
    strength: float, power: float, security: float, kl: float
) -> None:
    got = expected(DOSE, "power", strength)
    assert got.margins == {"power": pytest.approx(power), "security": pytest.approx(security)}
    assert got.kl == pytest.approx(kl)


def test_reading_a_measured_strength_gives_what_was_measured() -> None:
    dose = measured(reader_with_map()[0])
    for value, curve in dose["curves"].items():
        for place, strength in enumerate(STRENGTHS):
            margins = {seen: points[place] for seen, points in curve["margins"].items()}
            assert expected(dose, value, strength) == Expected(margins, curve["kl"][place])


def test_curves_of_one_side_are_flat_on_the_other() -> None:
    one_side = {"strengths": [1.0], "curves": {"power": {"kl": [0.1], "leakage": [0], "margins": {"power": [0.5]}}}}
    assert expected(one_side, "power", -1.0) == Expected({"power": 0.0}, 0.0)


def test_an_unknown_value_is_named_with_the_nearest_one() -> None:
    with pytest.raises(NeVAError, match=r"no value 'powr' \(did you mean 'power'\?\)"):
        expected(DOSE, "powr", 1.0)


@pytest.mark.parametrize("strength", [math.nan, math.inf, "1", True, None])
def test_a_strength_that_is_no_finite_number_is_refused(strength: Any) -> None:
    with pytest.raises(NeVAError, match="finite number"):
        expected(DOSE, "power", strength)


@pytest.mark.parametrize(
    "damaged",
    [
        None,
        {},
        [],
        {"strengths": [1.0], "curves": {}},
        {"strengths": [1.0, -1.0], "curves": DOSE["curves"]},
        {"strengths": ["a"], "curves": DOSE["curves"]},
        {"strengths": [1.0], "curves": DOSE["curves"]},
        {"strengths": [1.0], "curves": {"power": None}},
        {"strengths": [1.0], "curves": {"power": {"kl": [0.1]}}},
        {"strengths": [1.0], "curves": {"power": {"margins": {"power": [0.5]}}}},
        {"strengths": [1.0], "curves": {"power": {"kl": [math.nan], "margins": {"power": [0.5]}}}},
        {"strengths": [1.0], "curves": {"power": {"kl": [0.1], "margins": {"power": "x"}}}},
    ],
)
def test_damaged_curves_are_refused(damaged: Any) -> None:
    with pytest.raises(NeVAError, match="dose curve"):
        expected(damaged, "power", 1.0)
