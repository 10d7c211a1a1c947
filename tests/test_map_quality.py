"""The benchmark beside CAA: its statistics are what loops give, and an interrupted run ends with the same report."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
import reference
import torch
from tiny import SCENARIOS, TEXTS, VALUES, random_map, tiny_reader, tiny_tokenizer

from neva_hf import NeVAModel
from neva_hf.architectures import decoder_blocks
from neva_hf.measure import damage

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SIX = ["self_direction", "stimulation", "hedonism", "achievement", "power", "security"]


@pytest.fixture(autouse=True)
def scripts_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not BENCHMARKS.is_dir():
        pytest.skip("the benchmarks are not part of an installed package")
    monkeypatch.syspath_prepend(BENCHMARKS)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(str(sys.modules[name].__file__)).parent == BENCHMARKS:
            del sys.modules[name]


def script(name: str) -> Any:
    return importlib.import_module(name)


def random_log_probs(scenarios: int, values: Sequence[str] = SIX, seed: int = 0) -> list[dict[str, float]]:
    rng = np.random.default_rng(seed)
    return [{value: float(rng.normal()) for value in values} for _ in range(scenarios)]


def some_tables(sign: int = 1, targets: Sequence[str] = SIX, scenarios: int = 5, push: float = 1.0) -> Any:
    base = random_log_probs(scenarios)
    edited = {}
    for number, target in enumerate(targets):
        moved = random_log_probs(scenarios, seed=number + 1)
        edited[target] = [
            {key: was[key] + 0.3 * more[key] + (sign * push if key == target else 0) for key in was}
            for was, more in zip(base, moved, strict=True)
        ]
    return script("quality").tables(base, edited, SIX, sign), base, edited


# Statistics


@pytest.mark.parametrize("sign", [1, -1])
def test_statistics_are_what_loops_over_values_and_scenarios_give(sign: int) -> None:
    quality = script("quality")
    targets = SIX[:4]
    one, base, edited = some_tables(sign, targets)

    def margin(row: dict[str, float], seen: str, target: str) -> float:
        rivals = [row[key] for key in SIX if key != seen and (key != target or seen == target)]
        return row[seen] - mean(rivals)

    own, leaks, moves_own, moves_other = [], [], [], []
    for target in targets:
        shift = {
            seen: sign
            * mean(
                margin(now, seen, target) - margin(was, seen, target)
                for was, now in zip(base, edited[target], strict=True)
            )
            for seen in SIX
        }
        own.append(shift.pop(target))
        leaks.append(mean(max(0.0, one) for one in shift.values()))
        for first in SIX:
            for second in SIX[: SIX.index(first)]:
                moved = sign * mean(
                    (now[first] - now[second]) - (was[first] - was[second])
                    for was, now in zip(base, edited[target], strict=True)
                )
                if target in (first, second):
                    moves_own.append(moved if target == first else -moved)
                else:
                    moves_other.append(abs(moved))
    weights = quality.draws(len(base), count=10)
    found = quality.summary(one, weights, ["a", "b", "a", "b", "b"], {})
    assert found["target"][0] == pytest.approx(mean(own))
    assert found["nlr"][0] == pytest.approx(sum(leaks) / sum(own))
    assert found["nlr_mean_of_ratios"] == pytest.approx(
        mean(leak / gain for leak, gain in zip(leaks, own, strict=True) if gain > 0)
    )
    assert found["own"][0] == pytest.approx(mean(moves_own))
    assert found["other"][0] == pytest.approx(mean(moves_other))
    assert found["own_over_other"][0] == pytest.approx(mean(moves_own) / mean(moves_other))
    assert found["right_direction"] == sum(gain > 0 for gain in own)
    assert (2 * found["forms"]["a"] + 3 * found["forms"]["b"]) / 5 == pytest.approx(mean(own))
    assert len(leaks) == len(targets)
    assert min(leaks) > 0


def test_leakage_at_neighbours_and_the_largest_one_are_found() -> None:
    quality = script("quality")
    shifts = np.array([[[1.0, 0.3, 0.1, -0.5], [-0.2, 0.5, 0.0, 0.4]]])
    one = quality.Tables(SIX[:2], SIX[:4], shifts, np.zeros((1, 2, 6)))
    found = quality.summary(one, quality.draws(1, count=3), ["a"], {SIX[0]: [SIX[1]], SIX[1]: [SIX[0], SIX[2]]})
    assert found["neighbours_share"] == pytest.approx(0.3 / 0.8)
    assert found["nlr"][0] == pytest.approx((0.4 + 0.4) / 3 / 1.5)
    assert [(one["largest_leak"], one["largest_leak_at"]) for one in found["values"].values()] == [
        (0.3, SIX[1]),
        (0.4, SIX[3]),
    ]


def test_replies_that_a_scenario_does_not_have_take_no_part() -> None:
    quality = script("quality")
    base = random_log_probs(3)
    edited = {"power": random_log_probs(3, seed=1)}
    whole = quality.tables(base, edited, SIX, 1)
    part = quality.tables(
        [*base, {"power": 0.0, "security": 0.0}],
        {"power": [*edited["power"], {"power": 2.0, "security": 0.0}]},
        SIX,
        1,
    )
    weights = np.ones((1, 3)), np.ones((1, 4))
    power, security, hedonism = (SIX.index(name) for name in ("power", "security", "hedonism"))
    before, after = (quality.weighted(w, one.shifts)[0, 0] for w, one in zip(weights, (whole, part), strict=True))
    assert after[power] == pytest.approx((3 * before[power] + 2) / 4)
    # Without power's reply there is nothing to hold security's against.
    assert after[[security, hedonism]] == pytest.approx(before[[security, hedonism]])
    assert np.isnan(part.moves).any()
    assert np.isfinite(quality.own_over_other(part, weights[1])).all()


def test_intervals_hold_the_estimate_shrink_with_scenarios_and_are_the_same_again() -> None:
    quality = script("quality")
    widths = []
    for scenarios in (6, 96):
        one, *_ = some_tables(scenarios=scenarios)
        estimate, low, high = quality.interval(quality.target(one, quality.draws(scenarios)))
        assert low < estimate < high
        assert quality.interval(quality.target(one, quality.draws(scenarios))) == [estimate, low, high]
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_a_method_over_itself_is_exactly_one_and_ratios_are_paired() -> None:
    quality = script("quality")
    one, *_ = some_tables()
    twice = quality.Tables(one.targets, one.observed, 2 * one.shifts, 2 * one.moves)
    weights = quality.draws(5, count=50)
    assert quality.ratios(twice, one, weights) == {
        "target": pytest.approx([2, 2, 2]),
        "nlr": pytest.approx([1, 1, 1]),
        "own_over_other": pytest.approx([1, 1, 1]),
    }


# CAA and costs


@pytest.mark.parametrize("rows", [1, 2, 10])
@torch.no_grad()
def test_log_probs_and_costs_do_not_depend_on_the_rows_of_a_batch(rows: int) -> None:
    caa = script("caa")
    model, tokenizer = tiny_reader(), tiny_tokenizer()
    edited = random_map(model).apply_to(tiny_reader())
    settings = [(value, sign) for value in VALUES for sign in (1, -1)]

    def steer(settings: Any) -> Any:
        dials = [{value: float(sign)} for value, sign in settings]
        return edited.strengths(dials if len(dials) > 1 else dials[0])

    for scenario in SCENARIOS:
        got = caa.log_probs(edited, tokenizer, scenario, None, None, rows)
        wanted = reference.log_probs(model, tokenizer, scenario)
        assert got == {key: pytest.approx(float(one), abs=1e-5) for key, one in wanted.items()}
        with reference.edited(model, (random_map(model), {"power": -1.0})):
            wanted = reference.log_probs(model, tokenizer, scenario)
        got = caa.log_probs(edited, tokenizer, scenario, steer, ("power", -1), rows)
        assert got == {key: pytest.approx(float(one), abs=1e-5) for key, one in wanted.items()}
    sequences = [tokenizer(text).input_ids for text in TEXTS]
    found = caa.costs(edited, sequences, steer, settings, rows)
    wanted = damage(edited, tokenizer, TEXTS, [{value: float(sign)} for value, sign in settings])
    assert found["kl"] == pytest.approx([one.kl for one in wanted], rel=1e-4)
    ratios = [float(np.exp(loss - found["base_loss"])) for loss in found["loss"]]
    assert ratios == pytest.approx([one.perplexity_ratio for one in wanted], rel=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@torch.no_grad()
def test_caa_vectors_are_mean_differences_of_the_residual_stream(architecture: str) -> None:
    caa = script("caa")
    model, tokenizer = tiny_reader(architecture), tiny_tokenizer()
    sums = caa.Contrasts(torch.zeros(len(VALUES), 1, 32), torch.zeros(len(VALUES)).long())
    wanted = torch.zeros(len(VALUES), 32)
    for scenario in SCENARIOS:
        sums.add(model, tokenizer, scenario, VALUES, [0])
        encoded = script("caa").encode(tokenizer, scenario)
        means = {}
        for key, reply, mask in zip(encoded.keys, encoded.replies, encoded.mask, strict=True):
            ids = torch.cat([encoded.prompt[0], reply[mask > 0]])[None]
            states = model(ids, output_hidden_states=True).hidden_states[1][0]
            means[key] = states[encoded.prompt.shape[1] :].mean(0)
        for row, value in enumerate(VALUES):
            if value in means:
                rivals = torch.stack([one for key, one in means.items() if key != value]).mean(0)
                wanted[row] += (means[value] - rivals) / sum(value in one.replies for one in SCENARIOS)
    torch.testing.assert_close(sums.mean()[:, 0], wanted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_calibrated_vector_costs_what_was_asked_for() -> None:
    caa = script("caa")
    model, tokenizer = tiny_reader(), tiny_tokenizer()
    block = decoder_blocks(model)[1][0]
    torch.manual_seed(0)
    vectors = {(value, -1): torch.randn(32) for value in VALUES}
    sequences = [tokenizer(text).input_ids for text in TEXTS]
    found = caa.calibrated(model, block, vectors, sequences, 0.05, 2)
    scaled = {(value, sign): found["scales"][value] * one for (value, sign), one in vectors.items()}
    assert caa.costs(model, sequences, caa.steer_by(block, scaled), list(scaled), 3)["kl"] == pytest.approx(
        [0.05] * len(VALUES), rel=0.08
    )
    plain = model(torch.tensor([sequences[0]])).logits
    with caa.added(block, torch.zeros(1, 32)):
        assert torch.equal(model(torch.tensor([sequences[0]])).logits, plain)


# Whole runs


@pytest.fixture
def run_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the script on a tiny model with a tiny map, and gives the report."""
    base = tiny_reader()
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    random_map(base, base_model_name_or_path=str(tmp_path / "base")).save_pretrained(tmp_path / "tiny-map")
    lines = [
        json.dumps({"form": form, "question": one.question, "replies": dict(one.replies)})
        for form, one in zip(["advice", "advice", "story"], SCENARIOS, strict=True)
    ]
    for split in ("train", "dev", "test"):
        (tmp_path / "scenarios").mkdir(exist_ok=True)
        (tmp_path / "scenarios" / f"{split}.jsonl").write_text("\n".join(lines))
    (tmp_path / "text.txt").write_text("Water boils at a hundred. " * 200)
    map_quality = script("map_quality")
    monkeypatch.setattr(map_quality, "load_neutral_texts", lambda split, limit=None: TEXTS[:limit])
    monkeypatch.setattr(map_quality, "WINDOW", 64)

    def run(folder: str, *more: str) -> Any:
        output = tmp_path / folder
        arguments = [str(tmp_path / "tiny-map"), "--scenarios", str(tmp_path / "scenarios"), "--layers", "0", "1"]
        arguments += ["--output", str(output), "--picture", str(output / "p.png"), "--windows", "2"]
        map_quality.main([*arguments, "--wikitext", str(tmp_path / "text.txt"), *more])
        report = output / "map_quality_tiny-map.json"
        return json.loads(report.read_text()) if report.exists() else None

    run.folder = tmp_path  # type: ignore[attr-defined]
    return run


def test_a_run_reports_both_methods_at_equal_damage(run_script: Any) -> None:
    result = run_script("whole")
    for method in ("map", "caa"):
        for side in ("+1", "-1"):
            found = result["methods"][method][side]
            assert list(found["values"]) == VALUES
            assert found["wikitext"]["tokens"] == 2 * 63
            assert found["wikitext"]["base_perplexity"] > 1
    assert result["caa"]["calibrated_kl"]["-1"] == {value: pytest.approx(0.05, rel=0.1) for value in VALUES}
    assert str(result["caa"]["layer"]) == max(result["caa"]["target_on_dev"], key=result["caa"]["target_on_dev"].get)
    words = (run_script.folder / "whole" / "map_quality_tiny-map.md").read_text()
    assert "| neuron map | +1 |" in words
    assert "| CAA | -1 |" in words
    assert (run_script.folder / "whole" / "p.png").stat().st_size > 10_000


def test_parts_and_an_interrupted_run_end_with_the_same_report(
    run_script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = run_script("whole")
    assert run_script("parts", "--part", "map") is None
    assert run_script("parts", "--part", "caa") is None
    capsys.readouterr()
    assert run_script("parts") == wanted
    assert "[1 of" not in capsys.readouterr().out

    kept, done = script("kept"), []
    put = kept.Kept.put

    def put_and_fail(self: Any, name: str, found: Any) -> None:
        put(self, name, found)
        done.append(name)
        if len(done) == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(kept.Kept, "put", put_and_fail)
    with pytest.raises(KeyboardInterrupt):
        run_script("killed")
    assert run_script("killed") == wanted
    assert len(set(done)) == len(done)


def test_another_map_or_split_does_not_take_up_what_is_kept(run_script: Any) -> None:
    run_script("one", "--part", "map")
    run_script("one", "--part", "map", "--limit", "2")
    assert len(list((run_script.folder / "one").glob(".*.state.json"))) == 2


def test_pieces_of_other_processes_are_seen_and_not_overwritten(tmp_path: Path) -> None:
    kept = script("kept")
    first = kept.Kept(tmp_path, "run", {"a": 1}, "map")
    first.put("x", [1.5])
    second = kept.Kept(tmp_path, "run", {"a": 1}, "caa")
    second.put("y", 2)
    first.put("z", 3)
    joined = kept.Kept(tmp_path, "run", {"a": 1})
    assert joined.pieces == {"x": [1.5], "y": 2, "z": 3}
    assert kept.Kept(tmp_path, "run", {"a": 2}).pieces == {}
    assert isinstance(joined.path.name, str)
    assert joined.path.name.endswith(".state.json")


# Benchmarks of others


def test_differences_in_accuracy_are_paired() -> None:
    capability = script("capability")
    base, edited = "1100110011", "1100110000"
    found = capability.compared(base, edited)
    gaps = [100 * (int(now) - int(was)) for was, now in zip(base, edited, strict=True)]
    assert (found["accuracy"], found["points"]) == (0.4, pytest.approx(-20))
    assert found["error"] == pytest.approx(stdev(gaps) / len(gaps) ** 0.5)
    assert capability.compared(base, base) == {"accuracy": 0.6, "points": 0, "error": 0}
    half = capability.mean_of([base, base], [base, edited])
    assert half == {"accuracy": pytest.approx(0.5), "points": pytest.approx(-10), "error": found["error"] / 2}
    assert capability.mean_of([base], [edited]) == pytest.approx(found)


def test_fingerprints_tell_maps_apart() -> None:
    kept = script("kept")
    base = tiny_reader()
    same = [kept.map_fingerprint(random_map(base)) for _ in range(2)]
    others = [random_map(base, seed=5), random_map(base, units={"power": [1.0, 2.0]})]
    assert same[0] == same[1]
    assert len({same[0], *map(kept.map_fingerprint, others)}) == 3
    assert isinstance(NeVAModel.from_map(base, others[0]), NeVAModel)
