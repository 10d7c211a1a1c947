"""A whole evaluation on tiny models: what it measures, that it goes on where it was, and what it refuses."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from tiny import SCENARIOS, TEXTS, VALUES, random_map, tiny_reader, tiny_tokenizer

from neva_hf import NeVAError, NeVAModel, Scenario
from neva_hf.baselines import Evidence, Method, from_model
from neva_hf.dial import dialled
from neva_hf.evaluation import Extra, Run, compare, evaluate
from neva_hf.evaluation.kept import Kept, Piece, map_fingerprint, model_fingerprint, share_out, work_off
from neva_hf.evaluation.steered import steered_damage, steered_log_probs
from neva_hf.evaluation.together import chosen_pairs
from neva_hf.identify.dose import dose_curves
from neva_hf.measure import damage, margins
from neva_hf.values import load_value_system

SYSTEM = load_value_system()
FULL: dict[str, Any] = {"pairs": 2, "opposing": True, "dose": [-1.0, 0.5, 1.0], "few": 2, "system": SYSTEM}


def tiny_map_model(seed: int = 0) -> NeVAModel:
    base = tiny_reader(seed=seed)
    return random_map(base).apply_to(base)


def run(model: NeVAModel | None = None, methods: Sequence[Any] | None = None, **options: Any) -> dict[str, Any]:
    model = model or tiny_map_model()
    options = {"neutral_texts": TEXTS, "samples": 50, **options}
    scenarios = options.pop("scenarios", SCENARIOS)
    return evaluate(methods or [from_model(model)], model, tiny_tokenizer(), scenarios, **options)


def prompting(values: Sequence[str] = VALUES) -> Method:
    """A method that works by the prompt alone."""

    @contextmanager
    def at(rows: Any) -> Iterator[None]:
        yield

    return Method("Prompt", list(values), at, lambda dials: " ".join(f"Much {value}." for value in dials) or None)


# What is measured


@torch.no_grad()
def test_log_probs_under_a_method_are_those_of_the_edited_model() -> None:
    base, model = tiny_reader(), tiny_map_model()
    found = steered_log_probs(model, tiny_tokenizer(), SCENARIOS, from_model(model), {"power": 1.0})
    with reference.edited(base, (random_map(base), {"power": 1.0})):
        for row, scenario in zip(found, SCENARIOS, strict=True):
            wanted = reference.log_probs(base, tiny_tokenizer(), scenario)
            assert row == {key: pytest.approx(float(one), abs=1e-5) for key, one in wanted.items()}


@torch.no_grad()
def test_a_method_by_the_prompt_and_an_opposing_prompt_stand_one_after_the_other() -> None:
    base = tiny_reader()
    found = steered_log_probs(
        base, tiny_tokenizer(), SCENARIOS[:1], prompting(), {"power": 1.0}, system="Little power."
    )
    wanted = reference.log_probs(base, tiny_tokenizer(), SCENARIOS[0], "Little power.\nMuch power.")
    assert found[0] == {key: pytest.approx(float(one), abs=1e-5) for key, one in wanted.items()}


def test_strengths_that_are_set_on_the_model_change_nothing_of_what_is_measured() -> None:
    model = tiny_map_model()
    before = run(model)
    model.set_strengths(power=2.0)
    assert run(model) == before
    assert model.get_strengths()["power"] == 2.0


def test_damage_text_by_text_adds_up_to_that_of_all_texts() -> None:
    model = tiny_map_model()
    settings = [{value: -1.0} for value in VALUES]
    found = steered_damage(model, tiny_tokenizer(), TEXTS, from_model(model), settings)
    wanted = damage(model, tiny_tokenizer(), TEXTS, settings)
    tokens = sum(found["tokens"])
    assert len(found["tokens"]) == len(TEXTS)
    for kl, loss, one in zip(found["kl"], found["loss"], wanted, strict=True):
        assert sum(kl) / tokens == pytest.approx(one.kl, rel=1e-4)
        assert math.exp(sum(loss) / tokens) == pytest.approx(one.perplexity_ratio, rel=1e-4)


def test_a_report_holds_the_margins_of_every_value_at_every_strength() -> None:
    model, tokenizer = tiny_map_model(), tiny_tokenizer()
    report = run(model, strengths=[1.0, -0.5])
    base = steered_log_probs(model, tokenizer, SCENARIOS)
    for strength in (1.0, -0.5):
        found = report["methods"]["NeVA"]["strengths"][f"{strength:+g}"]
        for value in VALUES:
            with dialled(model, {value: strength}):
                now = [reference.log_probs(model, tokenizer, one) for one in SCENARIOS]
            after = [{key: float(told.detach()) for key, told in row.items()} for row in now]
            shift = np.mean(margins(after, value)) - np.mean(margins(base, value))
            assert found["values"][value]["target"][0] == pytest.approx(math.copysign(1, strength) * shift, abs=1e-5)
        assert found["damage"]["texts"] == len(TEXTS)


def test_methods_are_put_beside_the_first_one() -> None:
    model = tiny_map_model()
    report = run(model, [from_model(model), from_model(model, "again"), prompting()])
    assert list(report["methods"]) == ["NeVA", "again", "Prompt"]
    assert report["methods"]["NeVA"]["strengths"] == report["methods"]["again"]["strengths"]
    assert report["first_beside"]["again"]["+1"]["target"]["minus"] == [0, 0, 0]
    gap = report["first_beside"]["Prompt"]["-1"]["target"]["minus"][0]
    one, other = (report["methods"][name]["strengths"]["-1"]["target"][0] for name in ("NeVA", "Prompt"))
    assert gap == pytest.approx(one - other)


@torch.no_grad()
def test_pairs_say_how_much_of_each_shift_is_left_when_both_are_dialled() -> None:
    model, tokenizer = tiny_map_model(), tiny_tokenizer()
    report = run(model, pairs=[("power", "security")], few=2, strengths=[-1.0], system=SYSTEM)

    def shift(dials: dict[str, float], value: str, other: str) -> float:
        with dialled(model, dials):
            now = [reference.log_probs(model, tokenizer, one) for one in SCENARIOS[:2]]
        told = [{key: float(log_prob) for key, log_prob in row.items()} for row in now]
        base = steered_log_probs(model, tokenizer, SCENARIOS[:2])
        return -float(np.mean(margins(told, value, [other])) - np.mean(margins(base, value, [other])))

    (pair,) = report["pairs"]["pairs"]
    both = {"power": -1.0, "security": -1.0}
    for value, other in (("power", "security"), ("security", "power")):
        assert pair["alone"][value][0] == pytest.approx(shift({value: -1.0}, value, other), abs=1e-5)
        assert pair["together"][value][0] == pytest.approx(shift(both, value, other), abs=1e-5)
    alone, together = (sum(one[0] for one in pair[when].values()) for when in ("alone", "together"))
    assert pair["relation"] == "adjacent"
    assert report["pairs"]["scenarios"] == 2
    assert pair["held"][0] == (pytest.approx(together / alone) if alone > 0 else None)


def test_drawn_pairs_use_all_values_about_equally_often() -> None:
    names = list(SYSTEM.names)
    drawn = chosen_pairs(names, 10, seed=3)
    assert len({frozenset(pair) for pair in drawn}) == 10
    assert sorted(sum(name in pair for pair in drawn) for name in names) == [2] * 10
    assert chosen_pairs(names, 10, seed=3) == drawn
    assert chosen_pairs(names, 10, seed=4) != drawn
    assert len(chosen_pairs(["a", "b"], 9)) == 1


@torch.no_grad()
def test_opposing_prompts_push_the_other_way_and_dials_are_measured_behind_them() -> None:
    model, tokenizer = tiny_map_model(), tiny_tokenizer()
    report = run(model, opposing=True, few=1)
    found = report["opposing"]
    assert found["prompts"]["power"] == "You have a low level of power."
    told = reference.log_probs(model, tokenizer, SCENARIOS[0], "You have a low level of power.")
    base = steered_log_probs(model, tokenizer, SCENARIOS[:1])
    prompt = margins([{key: float(one) for key, one in told.items()}], "power")[0] - margins(base, "power")[0]
    with dialled(model, {"power": 1.0}):
        told = reference.log_probs(model, tokenizer, SCENARIOS[0], "You have a low level of power.")
    both = margins([{key: float(one) for key, one in told.items()}], "power")[0] - margins(base, "power")[0]
    assert found["values"]["power"]["prompt"][0] == pytest.approx(prompt, abs=1e-5)
    assert found["values"]["power"]["both"][0] == pytest.approx(both, abs=1e-5)
    assert found["both"][0] == pytest.approx(np.mean([one["both"][0] for one in found["values"].values()]))
    assert run(model, opposing=lambda value, strength: "No.", few=1)["opposing"]["prompts"]["power"] == "No."
    assert (
        run(model, opposing=True, strengths=[-1.0])["opposing"]["prompts"]["power"]
        == "You have a high level of power."
    )


def test_dose_curves_are_those_that_identification_measures() -> None:
    model = tiny_map_model()
    strengths = [-1.0, 0.5, 2.0]
    found = run(model, dose=strengths, few=3)["dose"]
    wanted = dose_curves(model, tiny_tokenizer(), SCENARIOS, TEXTS, strengths=strengths)
    assert found["strengths"] == wanted["strengths"]
    for value in VALUES:
        assert found["curves"][value]["kl"] == pytest.approx(wanted["curves"][value]["kl"], abs=2e-5)
        for seen, points in wanted["curves"][value]["margins"].items():
            assert found["curves"][value]["margins"][seen] == pytest.approx(points, abs=1e-4)
    assert run(model, dose=wanted)["dose"] == {"source": "the map", **wanted}


def test_further_measurements_are_made_of_the_base_model_and_of_every_method() -> None:
    model = tiny_map_model()
    asked: list[Any] = []

    def measure(method: Method | None, dials: Any, found: Any) -> Any:
        asked.append((method.name if method else None, dials))
        return [len(one) for one in dials]

    lengths = Extra("lengths", 1, measure, sum_up=lambda base, found: [base, sum(found or [])])
    doubled = Extra("doubled", 1, lambda method, dials, found: 2 * found, after="lengths")
    report = run(model, [from_model(model), prompting()], extras=[doubled, lengths])
    assert report["lengths"] == {"base": [[0], 0], "methods": {"NeVA": [[0], 6], "Prompt": [[0], 6]}}
    assert report["doubled"] == {"base": [0, 0], "methods": {"NeVA": [1] * 12, "Prompt": [1] * 12}}
    assert [name for name, _ in asked] == [None, "NeVA", "Prompt"]
    assert asked[0][1] == [{}]
    assert asked[1][1] == [{value: strength} for strength in (1.0, -1.0) for value in VALUES]


def test_limit_takes_the_first_scenarios_and_values_choose_what_is_dialled() -> None:
    model = tiny_map_model()
    assert run(model, limit=2) == run(model, scenarios=SCENARIOS[:2])
    report = run(model, values=["power"], system=SYSTEM)
    assert list(report["methods"]["NeVA"]["strengths"]["+1"]["values"]) == ["power"]
    # In the order of the circle, however the scenarios have them.
    assert report["observed"] == ["power", "security", "benevolence"]
    assert report["scenarios"]["count"] == 3


# Reproducing and going on


def test_two_runs_give_the_same_report_bit_for_bit_and_the_seed_moves_intervals_alone() -> None:
    one, again, other = run(**FULL), run(**FULL), run(**FULL, seed=1)
    assert json.dumps(one) == json.dumps(again)
    first, second = (found["methods"]["NeVA"]["strengths"]["+1"] for found in (one, other))
    assert first["target"][0] == second["target"][0]
    assert first["target"][1:] != second["target"][1:]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("after", [1, 7, 20])
def test_an_interrupted_run_goes_on_and_gives_the_same_report_bit_for_bit(after: int, tmp_path: Path) -> None:
    wanted, lines = run(**FULL, checkpoint=tmp_path / "whole"), []

    def breaking(line: str) -> None:
        if len(lines) == after:
            raise Interrupted
        lines.append(line)

    with pytest.raises(Interrupted):
        run(**FULL, checkpoint=tmp_path / "state", tell=breaking)
    more: list[str] = []
    found = run(**FULL, checkpoint=tmp_path / "state", tell=more.append)
    assert json.dumps(found) == json.dumps(wanted)
    whole = len(json.loads(next((tmp_path / "whole").iterdir()).read_text()))
    assert len(more) == whole - after
    assert more[0].startswith(f"[1 of {whole - after}] ")
    assert "left" in more[-1]
    nothing: list[str] = []
    assert json.dumps(run(**FULL, checkpoint=tmp_path / "state", tell=nothing.append)) == json.dumps(wanted)
    assert nothing == []


@pytest.mark.parametrize("change", ["model", "map", "scenarios", "texts", "few", "values"])
def test_what_was_kept_of_another_run_is_not_taken_up(change: str, tmp_path: Path) -> None:
    run(checkpoint=tmp_path, opposing=True)
    model, options = tiny_map_model(), {"opposing": True}
    if change == "model":
        model = tiny_map_model(seed=3)
    elif change == "map":
        base = tiny_reader()
        model = random_map(base, seed=9).apply_to(base)
    elif change == "scenarios":
        options["scenarios"] = SCENARIOS[::-1]
    elif change == "texts":
        options["neutral_texts"] = TEXTS[::-1]
    elif change == "few":
        options["few"] = 1
    else:
        options["values"] = VALUES[::-1]
    fresh = run(model, **options)
    assert json.dumps(run(model, **options, checkpoint=tmp_path)) == json.dumps(fresh)


def test_half_a_state_file_is_computed_again(tmp_path: Path) -> None:
    wanted = run(checkpoint=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text()[:-40])
    assert run(checkpoint=tmp_path) == wanted


def test_processes_that_share_the_pieces_give_the_report_of_one(tmp_path: Path) -> None:
    wanted = run(**FULL)
    runs = []
    for part in (0, 1):
        model = tiny_map_model()
        options = {**FULL, "neutral_texts": TEXTS, "samples": 50, "checkpoint": tmp_path, "part": part}
        runs.append(Run.of([from_model(model)], model, tiny_tokenizer(), SCENARIOS, **options))
    shares = runs[0].shares(2)
    assert not set(shares[0]) & set(shares[1])
    for one, names in zip(runs, shares, strict=True):
        one.work(names)
    with pytest.raises(NeVAError, match="not finished"):
        Run.of([from_model(model)], model, tiny_tokenizer(), SCENARIOS, neutral_texts=TEXTS).report()
    assert json.dumps(runs[0].report()) == json.dumps(wanted)
    assert len(list(tmp_path.iterdir())) == 2


def test_pieces_of_a_method_that_is_fitted_stay_together() -> None:
    pieces = [Piece(f"{name}{number}", 1, dict, name) for name in "abc" for number in range(4)]
    parts = share_out(pieces, 2, {"a": 5.0, "b": 5.0})
    for name in "ab":
        assert [any(piece.needs == name for piece in part) for part in parts].count(True) == 1
    assert sorted(sum(piece.needs == "c" for piece in part) for part in parts) == [2, 2]
    assert [piece.name for part in share_out(pieces, 1) for piece in part] == [piece.name for piece in pieces]


def test_pieces_of_other_processes_are_seen_and_not_overwritten(tmp_path: Path) -> None:
    first, second = (Kept(tmp_path, "run", {"a": 1}, part) for part in ("0", "1"))
    first.put("x", [1.5])
    second.put("y", (2, 3))
    first.put("z", 3)
    joined = Kept(tmp_path, "run", {"a": 1})
    assert joined.pieces == {"x": [1.5], "y": [2, 3], "z": 3}
    assert second["y"] == [2, 3]
    assert Kept(tmp_path, "run", {"a": 2}).pieces == {}
    work_off(joined, [Piece("x", 1, lambda: pytest.fail("kept already"))])


def test_fingerprints_tell_maps_and_models_apart() -> None:
    base = tiny_reader()
    same = [map_fingerprint(random_map(base)) for _ in range(2)]
    others = [random_map(base, seed=5), random_map(base, units={"power": [1.0, 2.0]})]
    assert same[0] == same[1]
    assert len({same[0], *map(map_fingerprint, others)}) == 3
    before = model_fingerprint(base)
    assert model_fingerprint(tiny_reader(seed=1)) != before
    random_map(base).apply_to(base)
    assert model_fingerprint(base) == before


# Baselines


def test_a_map_is_compared_with_baselines_and_a_kept_comparison_fits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # (the function of that name hides the module)
    module = sys.modules[compare.__module__]

    def told(folder: str) -> dict[str, Any]:
        base, tokenizer = tiny_reader(), tiny_tokenizer()
        evidence = Evidence(base, tokenizer, VALUES, SCENARIOS, (), TEXTS)
        options = {"neutral_texts": TEXTS, "samples": 20, "checkpoint": tmp_path / folder}
        neuron_map = random_map(base)
        chosen = {"neuron_map": neuron_map, "baselines": ["caa", "system-prompt"], "evidence": evidence}
        return compare(base, tokenizer, SCENARIOS, **chosen, **options)

    report = told("one")
    assert list(report["methods"]) == ["NeVA", "CAA", "System prompt"]
    assert report["methods"]["System prompt"]["scalable"] is False
    kl = report["methods"]["CAA"]["strengths"]["-1"]["damage"]["values"]
    assert [kl[value]["kl"][0] for value in VALUES] == pytest.approx([0.05] * 3, rel=0.2)

    monkeypatch.setattr(module, "calibrated", lambda *args, **options: pytest.fail("calibrated again"))
    for file in (tmp_path / "one").glob("evaluate*"):
        file.unlink()
    assert json.dumps(told("one")) == json.dumps(report)
    monkeypatch.setattr(module, "METHODS", {"CAA": None, "System prompt": None})
    assert json.dumps(told("one")) == json.dumps(report)


# What is refused


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"methods": "none"}, "at least one method"),
        ({"methods": "twice"}, "Two methods are called 'NeVA'"),
        ({"values": ["benevolance"]}, "did you mean 'benevolence'"),
        ({"values": []}, "at least one value"),
        ({"strengths": [1.0, 0.0]}, "other than 0"),
        ({"strengths": [math.nan]}, "finite"),
        ({"strengths": []}, "Strengths"),
        ({"strengths": [1.0, 1.0]}, "different"),
        ({"limit": 0}, "`limit` must be at least 1"),
        ({"few": 0}, "must be at least 1"),
        ({"seed": -1}, "`seed`"),
        ({"neutral_texts": ["a", ""]}, "fewer than two tokens"),
        ({"scenarios": []}, "no scenarios"),
        ({"scenarios": SCENARIOS[2:]}, "no reply of benevolence"),
        ({"pairs": [("power", "powr")]}, "did you mean 'power'"),
        ({"pairs": [("power", "power")]}, "twice"),
        ({"dose": [0.0]}, "other than 0"),
        ({"extras": [Extra("dose", 0, lambda method, dials, found: 0)]}, "cannot be called 'dose'"),
    ],
)
def test_a_request_that_cannot_be_fulfilled_is_refused_before_anything_is_measured(
    options: dict[str, Any], says: str
) -> None:
    model = tiny_map_model()
    methods = {"none": [], "twice": [from_model(model)] * 2}.get(options.pop("methods", ""), [from_model(model)])
    scenarios = options.pop("scenarios", SCENARIOS)
    options = {"neutral_texts": TEXTS, "tell": lambda line: pytest.fail(line), **options}
    with pytest.raises(NeVAError, match=says):
        evaluate(methods, model, tiny_tokenizer(), scenarios, **options)


def test_a_value_that_only_some_scenarios_hold_is_measured_on_those() -> None:
    more = [*SCENARIOS, Scenario("And now?", {"power": "up", "security": "in"})]
    report = run(scenarios=more, limit=4)
    assert report["methods"]["NeVA"]["strengths"]["+1"]["values"]["benevolence"]["target"][0] is not None
