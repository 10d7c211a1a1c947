"""The `evaluate` metrics, loaded by path as anyone would, against numbers by hand and against neva_hf's own formulas."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neva_hf import load_value_system
from neva_hf.evaluation.control import csr
from neva_hf.evaluation.leakage import RELATIONS, nglr, nlr, relations
from neva_hf.evaluation.tables import draws, interval, tables

evaluate = pytest.importorskip("evaluate")

FOLDER = Path(__file__).parent.parent / "metrics"
NAMES = ["control_success_rate", "value_leakage"]
VALUES = list(load_value_system("schwartz10").names)
POWER = {"values": ["power", "security", "benevolence"], "before": [-2.0, -2.0, -2.0], "after": [-1.0, -1.5, -2.0]}


@pytest.fixture(scope="module")
def success() -> Any:
    return evaluate.load(str(FOLDER / "control_success_rate"))


@pytest.fixture(scope="module")
def leakage() -> Any:
    return evaluate.load(str(FOLDER / "value_leakage"))


def random_case(
    targets: list[str], questions: int = 7, seed: int = 0
) -> tuple[list[dict[str, float]], dict[str, list[dict[str, float]]]]:
    """Log-probabilities before, and by target after; the targets rise. Each question lacks one value."""
    random = np.random.default_rng(seed)
    before = [
        {value: float(random.normal(-2, 0.5)) for value in VALUES if value != VALUES[number % len(VALUES)]}
        for number in range(questions)
    ]
    after = {
        target: [
            {value: one + 0.4 * (value == target) + float(random.normal(0, 0.3)) for value, one in row.items()}
            for row in before
        ]
        for target in targets
    }
    return before, after


def as_inputs(before: Any, after: Any) -> dict[str, Any]:
    """The same as inputs of the metrics."""
    rows = [(number, target, row, now[number]) for target, now in after.items() for number, row in enumerate(before)]
    return {
        "predictions": [
            {"values": list(row), "before": list(row.values()), "after": [now[value] for value in row]}
            for _, _, row, now in rows
        ],
        "references": [target for _, target, _, _ in rows],
        "question_ids": [number for number, _, _, _ in rows],
    }


def test_the_rate_counts_won_choices_with_ties_as_halves(success: Any) -> None:
    found = success.compute(
        predictions=[
            {"values": ["power", "security", "tradition"], "before": [-2.0, -1.0, -3.0], "after": [-1.0, -1.5, -1.0]},
            {"values": ["power", "security"], "before": [-1.0, -2.0], "after": [-1.0, -2.0]},
        ],
        references=["power", "power"],
    )
    assert found["before"] == pytest.approx(2 / 3)
    assert found["control_success_rate"] == pytest.approx(2.5 / 3)
    assert found["change"] == pytest.approx(0.5 / 3)
    assert found["values"]["power"]["choices"] == 3


def test_verdicts_of_a_judge_are_the_rate_themselves(success: Any) -> None:
    rows = [
        {"values": ["power"], "before": [float(b)], "after": [float(a)]} for b, a in ((0, 1), (0, 1), (1, 1), (0, 0))
    ]
    found = success.compute(predictions=rows, references=["power"] * 4)
    assert (found["before"], found["control_success_rate"], found["change"]) == (0.25, 0.75, 0.5)
    low, high = found["change_interval"]
    assert low < 0.5 < high


def test_a_reply_that_opposes_the_target_is_its_only_rival(success: Any) -> None:
    row = {"values": ["power", "-power", "security"], "before": [-2.0, -3.0, -1.0], "after": [-2.0, -1.0, -3.0]}
    found = success.compute(predictions=[row], references=["power"], sign=-1)
    assert (found["before"], found["control_success_rate"], found["change"]) == (1.0, 0.0, 1.0)
    assert found["values"]["power"]["choices"] == 1


def test_the_rate_and_its_intervals_are_those_of_neva_hf(success: Any) -> None:
    targets = ["power", "benevolence"]
    before, after = random_case(targets)
    found = success.compute(**as_inputs(before, after), draws=200, seed=3)
    weights = draws(len(before), 200, 3)
    own_before, own_after = csr(tables(before, after, VALUES, 1), weights)
    for name, theirs in (
        ("before", own_before),
        ("control_success_rate", own_after),
        ("change", own_after - own_before),
    ):
        estimate, low, high = interval(theirs)
        assert [found[name], *found[f"{name}_interval"]] == pytest.approx([estimate, low, high])


def test_leakage_is_the_mean_rise_of_the_others_over_the_targets(leakage: Any) -> None:
    found = leakage.compute(predictions=[POWER], references=["power"])
    # power: +1 - (0.5 + 0) / 2; security beside benevolence: +0.5; benevolence beside security: -0.5, which is no rise.
    assert found["target_shift"] == pytest.approx(0.75)
    assert found["nlr"] == pytest.approx(0.25 / 0.75)
    assert found["nglr_adjacent"] == pytest.approx(0.5 / 0.75)
    assert found["nglr_opposite"] == 0.0
    assert math.isnan(found["nglr_within"])
    assert found["nglr"] == pytest.approx(0.25 / 0.75)
    assert found["values"]["power"]["largest_leak_at"] == "security"


def test_own_groups_take_the_place_of_schwartzs(leakage: Any) -> None:
    found = leakage.compute(predictions=[POWER], references=["power"], groups={"order": ["power", "security"]})
    assert found["nglr_within"] == pytest.approx(0.5 / 0.75)
    assert math.isnan(found["nglr_adjacent"])
    nothing = leakage.compute(predictions=[POWER], references=["power"], groups={})
    assert math.isnan(nothing["nglr"])
    assert nothing["nlr"] == found["nlr"]


def test_a_target_that_falls_has_infinite_leakage(leakage: Any) -> None:
    found = leakage.compute(predictions=[POWER], references=["power"], sign=-1)
    assert found["target_shift"] == pytest.approx(-0.75)
    assert math.isinf(found["nlr"])


@pytest.mark.parametrize("sign", [1, -1])
def test_leakage_and_its_intervals_are_those_of_neva_hf(leakage: Any, sign: int) -> None:
    targets = ["power", "benevolence", "hedonism"]
    before, after = random_case(targets)
    if sign < 0:
        before, after = after["power"], dict.fromkeys(targets, before)
    found = leakage.compute(**as_inputs(before, after), sign=sign, draws=200, seed=5)
    one = tables(before, after, VALUES, sign)
    related = relations(one, load_value_system("schwartz10"))
    weights = draws(len(before), 200, 5)
    ours = {
        "nlr": nlr(one, weights),
        "nglr": nglr(one, weights, related),
        **{f"nglr_{kind}": nglr(one, weights, related, [kind]) for kind in RELATIONS},
    }
    for name, theirs in ours.items():
        numbers = [found[name], *found[f"{name}_interval"]]
        assert [number if math.isfinite(number) else None for number in numbers] == pytest.approx(interval(theirs))


def test_the_relations_of_schwartzs_values_are_those_of_neva_hf(leakage: Any) -> None:
    module = sys.modules[type(leakage).__module__]
    system = load_value_system("schwartz10")
    for one in VALUES:
        for two in VALUES:
            there = module.relation(one, two, module.GROUPS, module.OPPOSITE, module.CIRCLE)
            assert there == system.relation(one, two), (one, two)


def test_inputs_that_do_not_fit_are_refused(success: Any, leakage: Any) -> None:
    for metric in (success, leakage):
        with pytest.raises(ValueError, match="not among"):
            metric.compute(predictions=[POWER], references=["tradition"])
        with pytest.raises(ValueError, match="as long as each other"):
            metric.compute(predictions=[{**POWER, "after": [1.0]}], references=["power"])
        with pytest.raises(ValueError, match="`sign`"):
            metric.compute(predictions=[POWER], references=["power"], sign=2)
        with pytest.raises(ValueError, match="question_ids"):
            metric.compute(predictions=[POWER], references=["power"], question_ids=[1, 2])


@pytest.mark.parametrize("name", NAMES)
def test_a_metric_runs_without_neva_hf(name: str) -> None:
    code = (
        "import sys; sys.modules['neva_hf'] = None\n"
        f"import evaluate; metric = evaluate.load({str(FOLDER / name)!r})\n"
        f"print(metric.compute(predictions=[{POWER!r}], references=['power'])['values'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "power" in done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_the_space_of_a_metric_is_complete(name: str) -> None:
    head = (FOLDER / name / "README.md").read_text().split("---")[1]
    for line in ("sdk: gradio", "app_file: app.py", "- evaluate", "- metric"):
        assert line in head
    assert {"app.py", "requirements.txt", f"{name}.py"} <= {file.name for file in (FOLDER / name).iterdir()}
