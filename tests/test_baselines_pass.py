"""The pass over training scenarios: it reads what each reply gives by itself, and can be interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from steered import MANY, evidence, slow_contrast, slow_states
from tiny import TEXTS, VALUES, tiny_reader, tiny_tokenizer

from neva_hf import NeVAError, Scenario
from neva_hf.baselines import Evidence, caa, cna, conva, dpn_le, npti, repe
from neva_hf.baselines.readings import BINS, Readings, bins

some_architectures = pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma3"])


def last(x: torch.Tensor) -> torch.Tensor:
    """`[L, tokens, features]` at the last token."""
    return x[:, -1]


@some_architectures
def test_the_pass_reads_what_each_reply_gives_by_itself(architecture: str) -> None:
    model = tiny_reader(architecture)
    readings = evidence(model).readings
    for row, value in enumerate(VALUES):
        close = {"atol": 1e-4, "rtol": 1e-3}
        for found, read in (
            (readings.mean_stream(), lambda seen: seen["streams"].mean(1)),
            (readings.last_stream(), lambda seen: last(seen["streams"])),
            (readings.mean_difference(), lambda seen: last(seen["inputs"])),
            (readings.mean_active(), lambda seen: (seen["gates"] > 0).double().mean(1)),
        ):
            torch.testing.assert_close(found[row].double(), slow_contrast(model, MANY, value, read), **close)


def test_the_samples_are_the_replies_in_their_order() -> None:
    model = tiny_reader()
    readings = evidence(model).readings
    rows = [(scenario, key) for scenario in MANY for key in scenario.replies]
    assert len(readings.last) == len(rows)
    for row, (scenario, key) in enumerate(rows):
        wanted = last(slow_states(model, scenario, key)["streams"]).float()
        torch.testing.assert_close(readings.last[row], wanted, atol=1e-4, rtol=1e-3)


def test_cohens_d_is_that_of_the_two_groups() -> None:
    model = tiny_reader()
    own, rival = [], []
    for scenario in MANY:
        if "benevolence" in scenario.replies:
            for key in scenario.replies:
                state = last(slow_states(model, scenario, key)["inputs"])
                (own if key == "benevolence" else rival).append(state)
    first, second = torch.stack(own), torch.stack(rival)
    n1, n2 = len(first), len(second)
    pooled = ((n1 - 1) * first.var(0) + (n2 - 1) * second.var(0)) / (n1 + n2 - 2)
    wanted = (first.mean(0) - second.mean(0)) / pooled.sqrt()
    found = evidence(model).readings.cohens_d()[VALUES.index("benevolence")].double()
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


def test_the_histogram_tells_quantiles_to_a_few_per_cent() -> None:
    model = tiny_reader()
    outputs = torch.cat(
        [slow_states(model, scenario, key)["gates"] for scenario in MANY for key in scenario.replies], dim=1
    )
    wanted = torch.tensor(np.quantile(outputs.numpy(), 0.95, axis=1, method="inverted_cdf"))
    found = evidence(model).readings.quantile(0.95).double()
    clear = wanted > 0.01
    assert int(clear.sum()) > 20
    assert bool(((found / wanted - 1).abs()[clear] < 0.16).all())
    assert bool((found[wanted <= 0] == 0).all())


def test_bins_begin_with_everything_that_is_not_active() -> None:
    assert bins(torch.tensor([-5.0, 0.0, 1e-3, 1.01e-3, 1e6])).tolist() == [0, 0, 0, 1, BINS - 1]


class Interrupted(Exception):
    pass


def test_an_interrupted_pass_goes_on_and_ends_with_the_same_numbers(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("neva_hf.baselines.evidence._CHECKPOINT_EVERY", 2)
    model, seen = tiny_reader(), []

    def breaking(items: Any, what: str) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == 4:
                raise Interrupted
            yield item

    def counting(items: Any, what: str) -> Any:
        seen.append(len(items))
        return items

    whole = evidence(model).readings
    with pytest.raises(Interrupted):
        _ = evidence(model, checkpoint=tmp_path / "pass", progress=breaking).readings
    resumed = evidence(model, checkpoint=tmp_path / "pass", progress=counting).readings
    assert seen == [len(MANY) - 4]
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name]), name
    # Other scenarios do not take it up.
    _ = evidence(model, train=MANY[1:], checkpoint=tmp_path / "pass", progress=counting).readings
    assert seen[-1] == len(MANY) - 1


def test_methods_share_one_pass() -> None:
    seen = []

    def counting(items: Any, what: str) -> Any:
        seen.append(what)
        return items

    shared = evidence(progress=counting, dev=())
    for fit in (caa, cna, npti, dpn_le, conva, repe):
        fit(shared)
    assert seen == ["training scenarios"]


def test_a_value_that_no_scenario_contrasts_is_named() -> None:
    with pytest.raises(NeVAError, match="hedonism"):
        caa(evidence(values=["power", "hedonism"]))


def test_a_single_trait_is_held_against_its_opposite_alone() -> None:
    trait = [Scenario("What now?", {"open": "go there", "-open": "stay here", "calm": "sit down"})]
    readings = evidence(values=["open"], train=trait, dev=()).readings
    assert [(pair.own, pair.rivals) for pair in readings.pairs[0]] == [(0, [1])]
    torch.testing.assert_close(readings.last_stream()[0], readings.last[0] - readings.last[1])


def test_the_readings_do_not_grow_with_scenarios_but_for_the_samples() -> None:
    def sizes(train: list[Scenario]) -> dict[str, int]:
        found: Readings = Evidence(tiny_reader(), tiny_tokenizer(), VALUES, train, texts=TEXTS).readings
        return {name: tensor.numel() for name, tensor in found.tensors().items() if name != "last"}

    assert sizes(MANY) == sizes(MANY * 2)
