"""Control, leakage and choices: the formulas are what slow loops give, and intervals are those of the formulas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import mean
from typing import Any

import numpy as np
import pytest

from neva_hf import NeVAError
from neva_hf.evaluation import control, leakage
from neva_hf.evaluation.summary import beside, spent, summary
from neva_hf.evaluation.tables import Tables, draws, interval, over, tables, weighted
from neva_hf.values import load_value_system

SYSTEM = load_value_system()
SIX = ["self_direction", "stimulation", "hedonism", "achievement", "power", "security"]
Rows = list[dict[str, float]]


def random_log_probs(scenarios: int, values: Sequence[str] = SIX, seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    return [{value: float(rng.normal()) for value in values} for _ in range(scenarios)]


def some_log_probs(
    sign: int = 1, targets: Sequence[str] = SIX, scenarios: int = 5, push: float = 1.0
) -> tuple[Rows, dict[str, Rows]]:
    base = random_log_probs(scenarios)
    edited = {}
    for number, target in enumerate(targets):
        moved = random_log_probs(scenarios, seed=number + 1)
        edited[target] = [
            {key: was[key] + 0.3 * more[key] + (sign * push if key == target else 0) for key in was}
            for was, more in zip(base, moved, strict=True)
        ]
    return base, edited


def loop_margin(row: Mapping[str, float], seen: str, target: str) -> float:
    return row[seen] - mean(row[key] for key in row if key != seen and (key != target or seen == target))


def loop_shift(base: Rows, now: Rows, seen: str, target: str, sign: int) -> float:
    return sign * mean(
        loop_margin(after, seen, target) - loop_margin(before, seen, target)
        for before, after in zip(base, now, strict=True)
    )


def loop_csr(rows: Rows, seen: str, target: str) -> float:
    won = [
        float(row[seen] > row[key]) for row in rows for key in row if key != seen and (key != target or seen == target)
    ]
    return mean(won)


def found_summary(
    sign: int = 1, targets: Sequence[str] = SIX[:4], **options: Any
) -> tuple[Any, Rows, dict[str, Rows]]:
    base, edited = some_log_probs(sign, targets)
    one = tables(base, edited, SIX, sign)
    return summary(one, draws(len(base), count=20), SYSTEM, ["a", "b", "a", "b", "b"]), base, edited


# Control


@pytest.mark.parametrize("sign", [1, -1])
def test_target_shifts_and_success_rates_are_what_loops_give(sign: int) -> None:
    found, base, edited = found_summary(sign)
    for target, now in edited.items():
        one = found["values"][target]
        before, after = loop_csr(base, target, target), loop_csr(now, target, target)
        assert one["target"][0] == pytest.approx(loop_shift(base, now, target, target, sign))
        assert one["csr_before"][0] == pytest.approx(before)
        assert one["csr"][0] == pytest.approx(after)
        assert one["csr_change"][0] == pytest.approx(sign * (after - before))
    for name in ("target", "csr_before", "csr", "csr_change"):
        assert found[name][0] == pytest.approx(mean(one[name][0] for one in found["values"].values()))
    assert found["right_direction"] == sum(one["target"][0] > 0 for one in found["values"].values())
    assert found["csr_change"][0] > 0
    assert (2 * found["forms"]["a"] + 3 * found["forms"]["b"]) / 5 == pytest.approx(found["target"][0])


@pytest.mark.parametrize("sign", [1, -1])
def test_who_wins_between_two_values_is_counted_for_every_pair(sign: int) -> None:
    found, base, edited = found_summary(sign)
    choices = found["choices"]
    assert {frozenset(pair) for pair in choices["pairs"]} == {frozenset(pair) for pair in combinations(SIX, 2)}
    for place, (first, second) in enumerate(choices["pairs"]):
        assert choices["before"][place] == mean(float(row[first] > row[second]) for row in base)
        for target, now in edited.items():
            assert choices["after"][target][place] == mean(float(row[first] > row[second]) for row in now)


@pytest.mark.parametrize("sign", [1, -1])
def test_moves_of_choices_are_what_loops_give(sign: int) -> None:
    found, base, edited = found_summary(sign)
    own, other = [], []
    for target, now in edited.items():
        for first, second in combinations(SIX, 2):
            moved = sign * mean(
                (after[first] - after[second]) - (before[first] - before[second])
                for before, after in zip(base, now, strict=True)
            )
            if target in (first, second):
                own.append(moved if target == first else -moved)
            else:
                other.append(abs(moved))
    assert found["own"][0] == pytest.approx(mean(own))
    assert found["other"][0] == pytest.approx(mean(other))
    assert found["own_over_other"][0] == pytest.approx(mean(own) / mean(other))


def test_a_tie_is_half_a_win_and_a_single_trait_is_held_against_its_opposite() -> None:
    base = [{"calm": 0.0, "-calm": 0.0}, {"calm": -1.0, "-calm": 0.0}]
    one = tables(base, {"calm": [{"calm": 1.0, "-calm": 0.0}] * 2}, ["calm"], 1)
    before, after = control.csr(one, np.ones((1, 2)))
    assert (before[0], after[0]) == (0.25, 1.0)
    assert control.target(one, np.ones((1, 2)))[0] == pytest.approx(1.5)


# Leakage


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("what", ["margins", "csr"])
def test_nlr_and_nglr_are_what_loops_over_values_and_groups_give(sign: int, what: str) -> None:
    found, base, edited = found_summary(sign)
    ending = "" if what == "margins" else "_csr"

    def shift(seen: str, target: str) -> float:
        if what == "margins":
            return loop_shift(base, edited[target], seen, target, sign)
        return sign * (loop_csr(edited[target], seen, target) - loop_csr(base, seen, target))

    own = sum(shift(target, target) for target in edited)
    leaks = sum(mean(max(0.0, shift(seen, target)) for seen in SIX if seen != target) for target in edited)
    assert found[f"nlr{ending}"][0] == pytest.approx(leaks / own)
    assert leaks > 0
    by_group: dict[str, dict[str, float]] = {}
    for target in edited:
        for kind in ("within", "adjacent", "opposite"):
            near = [max(0.0, shift(seen, target)) for seen in SIX if SYSTEM.relation(target, seen) == kind]
            if near:
                by_group.setdefault(kind, {})[target] = mean(near)
    grouped = found[f"nglr{ending}"]
    assert set(grouped) == {"all", *by_group}
    for kind, leak in by_group.items():
        gained = sum(shift(target, target) for target in leak)
        assert grouped[kind][0] == pytest.approx(sum(leak.values()) / gained)
    every = [mean(leak[target] for leak in by_group.values() if target in leak) for target in edited]
    assert grouped["all"][0] == pytest.approx(sum(every) / own)


def test_leakage_at_neighbours_and_the_largest_leak_are_found() -> None:
    shifts = np.array([[[1.0, 0.3, 0.1, -0.5], [-0.2, 0.5, 0.0, 0.4]]])
    nothing = np.zeros((1, 2, 4))
    one = Tables(
        SIX[:2], SIX[:4], 1, shifts, nothing + 1, nothing, nothing,
        np.zeros((1, 2, 6)), np.zeros((1, 6)), np.zeros((1, 2, 6)),
    )  # fmt: skip
    found = summary(one, draws(1, count=3), SYSTEM)
    # Next to self_direction: universalism, stimulation. Next to stimulation: self_direction, hedonism.
    assert found["neighbours_share"][0] == pytest.approx(0.3 / 0.8)
    assert found["nlr"][0] == pytest.approx((0.4 + 0.4) / 3 / 1.5)
    assert [(one["largest_leak"], one["largest_leak_at"]) for one in found["values"].values()] == [
        (0.3, SIX[1]),
        (0.4, SIX[3]),
    ]


def test_a_rise_of_the_target_alone_leaks_nothing() -> None:
    base = random_log_probs(4)
    edited = {"power": [{**row, "power": row["power"] + 2} for row in base]}
    found = summary(tables(base, edited, SIX, 1), draws(4, count=5), SYSTEM)
    assert found["target"][0] == pytest.approx(2)
    assert found["nlr"][0] == pytest.approx(0)
    assert found["other"][0] == pytest.approx(0)
    assert found["values"]["power"]["largest_leak"] == pytest.approx(0)


def test_leakage_is_not_defined_where_targets_moved_the_other_way() -> None:
    base, edited = some_log_probs(1, ["power"], push=-3.0)
    one = tables(base, edited, SIX, 1)
    weights = draws(5, count=10)
    assert np.isinf(leakage.nlr(one, weights)).all()
    assert summary(one, weights, SYSTEM)["nlr"] == [None, None, None]
    assert over(np.array([1.0, 1.0, np.nan]), np.array([2.0, -1.0, 1.0])).tolist()[:2] == [0.5, np.inf]


def test_without_a_value_system_groups_and_neighbours_are_left_out() -> None:
    base, edited = some_log_probs()
    found = summary(tables(base, edited, SIX, 1), draws(5, count=5))
    assert found["nglr"] is None
    assert found["neighbours_share"] is None
    assert found["nlr"][0] > 0


# What is missing


def test_replies_that_a_scenario_does_not_have_take_no_part() -> None:
    base = random_log_probs(3)
    edited = {"power": random_log_probs(3, seed=1)}
    whole = tables(base, edited, SIX, 1)
    few = {"power": 0.0, "security": 0.0}
    part = tables([*base, few], {"power": [*edited["power"], {"power": 2.0, "security": 0.0}]}, SIX, 1)
    power, security, hedonism = (SIX.index(name) for name in ("power", "security", "hedonism"))
    before = weighted(np.ones((1, 3)), whole.shifts)[0, 0]
    after = weighted(np.ones((1, 4)), part.shifts)[0, 0]
    assert after[power] == pytest.approx((3 * before[power] + 2) / 4)
    # Without power's reply there is nothing to hold security's against.
    assert after[[security, hedonism]] == pytest.approx(before[[security, hedonism]])
    assert np.isnan(part.moves).any()
    assert part.faced[:, 0, power].tolist() == [5, 5, 5, 1]
    # Of all choices, not of the mean over questions: 15 in the first three, one in the last.
    won = [sum(float(row["power"] > row[key]) for key in row if key != "power") for row in edited["power"]]
    assert control.csr(part, np.ones((1, 4)))[1][0] == pytest.approx((sum(won) + 1) / 16)
    assert np.isfinite(control.own_over_other(part, np.ones((1, 4)))).all()


def test_a_target_that_is_not_watched_is_refused() -> None:
    base, edited = some_log_probs()
    with pytest.raises(NeVAError, match="no replies of power"):
        tables(base, {"power": edited["power"]}, SIX[:3], 1)


# Intervals


def test_intervals_hold_the_estimate_shrink_with_scenarios_and_are_the_same_again() -> None:
    widths = []
    for scenarios in (6, 96):
        base, edited = some_log_probs(scenarios=scenarios)
        one = tables(base, edited, SIX, 1)
        estimate, low, high = interval(control.target(one, draws(scenarios)))
        assert low < estimate < high  # type: ignore[operator]
        assert interval(control.target(one, draws(scenarios))) == [estimate, low, high]
        assert interval(control.target(one, draws(scenarios, seed=1))) != [estimate, low, high]
        widths.append(high - low)  # type: ignore[operator]
    assert widths[1] < widths[0] / 2


def test_intervals_are_percentiles_of_statistics_of_drawn_scenarios() -> None:
    base, edited = some_log_probs(scenarios=7)
    one = tables(base, edited, SIX, 1)
    weights = draws(7, count=40)
    again = []
    for row in weights[1:]:
        drawn = np.repeat(np.arange(7), row.astype(int))
        again.append(
            leakage.nlr(
                tables(
                    [base[i] for i in drawn], {key: [rows[i] for i in drawn] for key, rows in edited.items()}, SIX, 1
                ),
                np.ones((1, 7)),
            )[0]
        )
    found = interval(leakage.nlr(one, weights))
    assert found[1:] == pytest.approx(np.percentile(again, [2.5, 97.5]))


def test_an_interval_without_end_says_so() -> None:
    assert interval(np.array([1.0, *np.linspace(0, 1, 80), *[np.inf] * 20]))[2] is None
    assert interval(np.array([np.nan, np.nan])) == [None, None, None]
    assert interval(np.array([2.0, np.nan, 2.0])) == [2.0, 2.0, 2.0]


def test_a_method_beside_itself_is_even_and_beside_its_half_twice_as_far() -> None:
    base, edited = some_log_probs()
    one = tables(base, edited, SIX, 1)
    half = Tables(
        one.targets, one.observed, 1, one.shifts / 2, one.faced, one.won_before, one.won_after, one.moves / 2,
        one.first_before, one.first_after,
    )  # fmt: skip
    weights = draws(5, count=50)
    assert beside(one, one, weights)["target"] == {"minus": [0, 0, 0], "times": [1, 1, 1]}
    found = beside(one, half, weights)
    assert found["target"]["times"] == pytest.approx([2, 2, 2])
    assert found["nlr"]["minus"] == pytest.approx([0, 0, 0], abs=1e-12)
    assert found["target"]["minus"] == pytest.approx(interval(control.target(half, weights)))


def test_costs_are_sums_over_texts_and_their_intervals_over_drawn_texts() -> None:
    found = spent(
        {"tokens": [10, 30], "kl": [[1.0, 1.0], [2.0, 6.0]], "loss": [[0.0, 0.0], [4.0, 4.0]]}, ["power", "security"]
    )
    assert found["values"]["power"]["kl"][0] == pytest.approx(2 / 40)
    assert found["values"]["security"]["kl"] == pytest.approx([0.2, 0.2, 0.2])
    assert found["values"]["power"]["perplexity_ratio"] == [1, 1, 1]
    assert found["values"]["security"]["perplexity_ratio"][0] == pytest.approx(np.exp(8 / 40))
    assert found["kl"][0] == pytest.approx((2 / 40 + 8 / 40) / 2)
    assert found["values"]["power"]["kl"][1:] == pytest.approx([1 / 30, 1 / 10])
    assert found["tokens"] == 40
