"""Each baseline against its formula, written once more by hand on a tiny model (ConVA: test_baselines_conva.py)."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from steered import MANY, evidence, ids, logits, rewritten, slow_contrast, slow_states
from tiny import D_FF, LAYERS, VALUES, tiny_reader
from transformers import PreTrainedModel

from neva_hf import NeVAError
from neva_hf.architectures import decoder_blocks, find_down_projections
from neva_hf.baselines import caa, cna, dpn_le, npti, repe
from neva_hf.baselines.activations import find_activations
from neva_hf.baselines.caa import candidate_layers, dev_shift
from neva_hf.baselines.npti import pushing

POWER = VALUES.index("power")
some_architectures = pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma3"])


def blocks_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    return list(decoder_blocks(model)[1])


def last(x: torch.Tensor) -> torch.Tensor:
    """`[L, tokens, features]` at the last token."""
    return x[:, -1]


# CAA and RepE


@pytest.mark.parametrize("reading", ["mean", "last"])
@some_architectures
def test_caa_adds_the_mean_difference_behind_its_layer_at_all_positions(architecture: str, reading: Any) -> None:
    model = tiny_reader(architecture)
    method = caa(evidence(model), reading=reading, layers=[1])

    def read(seen: dict[str, torch.Tensor]) -> torch.Tensor:
        return seen["streams"][1].mean(0) if reading == "mean" else seen["streams"][1][-1]

    vector = slow_contrast(model, MANY, "power", read).float()
    with rewritten(blocks_of(model)[1], lambda x: x - 1.5 * vector, at_input=False):
        wanted = logits(model, ids())
    torch.testing.assert_close(logits(model, ids(), method, {"power": -1.5}), wanted, atol=1e-3, rtol=1e-3)


def test_several_values_add_up() -> None:
    shared = evidence()
    vectors = shared.readings.mean_stream()[:, 0]
    method = caa(shared, layers=[0])
    total = 0.5 * vectors[0] - 2 * vectors[2]
    with rewritten(blocks_of(shared.model)[0], lambda x: x + total, at_input=False):  # type: ignore[arg-type]
        wanted = logits(shared.model, ids())
    found = logits(shared.model, ids(), method, {VALUES[0]: 0.5, VALUES[2]: -2.0})
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_caa_takes_the_layer_that_moves_the_margin_most_on_dev() -> None:
    shared = evidence()
    method = caa(shared, layers=[0, 1])
    shifts = method.notes["dev_shift"]
    assert isinstance(shifts, dict)
    assert sorted(shifts) == ["0", "1"]
    assert method.notes["layer"] == int(max(shifts, key=shifts.__getitem__))
    assert shifts["0"] == pytest.approx(dev_shift(caa(shared, layers=[0]), shared), rel=1e-4)
    assert "dev_shift" not in caa(evidence(dev=()), layers=[0, 1]).notes


def test_caas_choice_of_a_layer_goes_on_where_it_was(tmp_path: Path, monkeypatch: Any) -> None:
    shared, seen = evidence(checkpoint=tmp_path / "pass"), []
    # (the package's `caa` is the function)
    module = sys.modules["neva_hf.baselines.caa"]
    monkeypatch.setattr(module, "dev_shift", lambda *args: seen.append(1) or float(len(seen)))
    assert caa(shared, layers=[0, 1]).notes["dev_shift"] == {"0": 1.0, "1": 2.0}
    assert caa(shared, layers=[0, 1]).notes == caa(shared, layers=[0, 1]).notes
    assert len(seen) == 2
    # Another contrast does not take it up.
    caa(shared, layers=[0, 1], reading="last")
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("depth", "wanted"), [(1, [0]), (2, [1]), (12, [4, 5, 6, 8, 9, 10]), (30, [9, 12, 15, 18, 21, 24])]
)
def test_candidate_layers_are_spread_over_the_middle(depth: int, wanted: list[int]) -> None:
    found = candidate_layers(depth)
    assert all(0 <= layer < depth for layer in found)
    if depth >= 12:
        assert found == wanted


@pytest.mark.parametrize("layers", [[], [LAYERS], [-1]])
def test_layers_that_do_not_exist_are_refused(layers: list[int]) -> None:
    for fit in (caa, repe):
        with pytest.raises(NeVAError, match="layers"):
            fit(evidence(dev=()), layers=layers)


@pytest.mark.parametrize("centring", ["pca_center", "pca_diff"])
def test_repe_adds_the_first_component_in_each_layer(centring: Any) -> None:
    shared = evidence()
    readings = shared.readings
    wanted_vectors = []
    for layer in range(LAYERS):
        rows = [(pair.own, rival) for pair in readings.pairs[POWER] for rival in pair.rivals]
        differences = torch.stack([readings.last[own, layer] - readings.last[rival, layer] for own, rival in rows])
        data = differences - differences.mean(0) if centring == "pca_diff" else differences
        direction = torch.linalg.svd(data.double()).Vh[0].float()
        wanted_vectors.append(direction if (differences @ direction > 0).float().mean() > 0.5 else -direction)
    method = repe(shared, centring=centring, layers=list(range(LAYERS)))
    with ExitStack() as stack:
        for block, vector in zip(blocks_of(shared.model), wanted_vectors, strict=True):  # type: ignore[arg-type]
            stack.enter_context(rewritten(block, lambda x, vector=vector: x + 3 * vector, at_input=False))
        wanted = logits(shared.model, ids())
    torch.testing.assert_close(logits(shared.model, ids(), method, {"power": 3.0}), wanted, atol=1e-3, rtol=1e-3)


# Neurons


def inputs_changed(model: torch.nn.Module, changes: list[Any]) -> ExitStack:
    stack = ExitStack()
    for module, change in zip(find_down_projections(model).values(), changes, strict=True):
        stack.enter_context(rewritten(module, change, at_input=True))
    return stack


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_cna_multiplies_the_neurons_with_the_largest_mean_difference(architecture: str) -> None:
    model = tiny_reader(architecture)
    share = 10 / (LAYERS * D_FF)
    shared = evidence(model)
    difference = slow_contrast(model, MANY, "power", lambda seen: last(seen["inputs"]))
    strong = torch.zeros(LAYERS * D_FF)
    replies = [(scenario, key) for scenario in MANY for key in scenario.replies]
    for scenario, key in replies:
        at_end = last(slow_states(model, scenario, key)["inputs"]).abs().flatten()
        strong[at_end.topk(max(round(0.001 * len(at_end)), 1)).indices] += 1
    score = difference.abs().flatten().masked_fill(strong > 0.8 * len(replies), 0)
    chosen = torch.zeros(LAYERS * D_FF)
    chosen[score.topk(10).indices] = 1
    factors = (1 + 2.5 * chosen).reshape(LAYERS, D_FF)
    method = cna(shared, share=share)
    assert method.notes["neurons"] == dict.fromkeys(VALUES, 10)
    with inputs_changed(model, [lambda x, f=factor: x * f for factor in factors]):
        wanted = logits(model, ids())
    torch.testing.assert_close(logits(model, ids(), method, {"power": 2.5}), wanted, atol=1e-4, rtol=1e-4)


def test_cna_at_minus_one_switches_neurons_off() -> None:
    shared = evidence()
    method = cna(shared, share=10 / (LAYERS * D_FF))
    seen: list[torch.Tensor] = []
    watching = [lambda x: seen.append(x) or x] * LAYERS  # type: ignore[func-returns-value]
    with method.at([{"power": -1.0}]), inputs_changed(shared.model, watching):
        logits(shared.model, ids())
    assert sum(int((x == 0).all((0, 1)).sum()) for x in seen) == 10


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "bloom"])
@pytest.mark.parametrize("strength", [2.0, -1.5, 0.5])
def test_npti_raises_the_values_neurons_and_clamps_the_opposites(architecture: str, strength: float) -> None:
    model = tiny_reader(architecture)
    shared = evidence(model, dev=())
    method = npti(shared)
    probability = slow_contrast(model, MANY, "power", lambda seen: (seen["gates"] > 0).double().mean(1)).float()
    own, other = probability > 0.1, probability < -0.1
    if strength < 0:
        own, other = other, own
    gamma = abs(strength)
    amount = gamma * shared.readings.quantile(0.95) / (1 + torch.exp(-10 * (probability.abs() - 0.15)))
    held = min(gamma, 1.0)

    def change(layer: int) -> Any:
        def changed(x: torch.Tensor) -> torch.Tensor:
            out = x.clone()
            out[..., own[layer]] += amount[layer, own[layer]]
            low = out[..., other[layer]]
            out[..., other[layer]] = torch.where(low > 0, (1 - held) * low, low)
            return out

        return changed

    names = find_activations(model)
    assert names is not None
    with ExitStack() as stack:
        for layer, name in enumerate(names):
            stack.enter_context(rewritten(model.get_submodule(name), change(layer), at_input=False))
        wanted = logits(model, ids())
    torch.testing.assert_close(logits(model, ids(), method, {"power": strength}), wanted, atol=1e-3, rtol=1e-3)


def test_npti_clamps_to_nothing_above_zero_from_strength_one_on() -> None:
    model, shape = tiny_reader(), (1, LAYERS, D_FF)
    names = find_activations(model)
    assert names is not None
    at = pushing(model, ["open"], names, torch.zeros(shape), torch.zeros(shape).bool(), torch.ones(shape).bool())
    seen: list[torch.Tensor] = []
    with torch.no_grad(), at([{"open": 3.0}]), ExitStack() as stack:
        for name in names:
            module = model.get_submodule(name)
            stack.enter_context(rewritten(module, lambda x: seen.append(x) or x, at_input=False))  # type: ignore[func-returns-value]
        model(input_ids=ids())
    assert all(float(x.max()) <= 0 for x in seen)


def test_npti_reads_the_down_projection_where_the_activation_is_no_module(monkeypatch: Any) -> None:
    monkeypatch.setattr("neva_hf.baselines.evidence.find_activations", lambda model: None)
    shared = evidence(dev=())
    wanted = slow_contrast(shared.model, MANY, "power", lambda seen: (seen["inputs"] > 0).double().mean(1))  # type: ignore[arg-type]
    torch.testing.assert_close(shared.readings.mean_active()[POWER].double(), wanted, atol=1e-6, rtol=1e-6)
    method = npti(shared)
    assert method.notes["read_at"] == "the down projection's input"
    assert not torch.equal(logits(shared.model, ids(), method, {"power": 2.0}), logits(shared.model, ids()))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_dpn_le_shifts_the_neurons_that_pass_both_tests_by_their_difference(architecture: str) -> None:
    model = tiny_reader(architecture)
    shared = evidence(model)
    quantile, effect = 0.8, 0.5
    difference = slow_contrast(model, MANY, "power", lambda seen: last(seen["inputs"])).float()
    size = difference.abs()
    large = torch.stack([one > torch.tensor(np.quantile(one.numpy(), quantile)) for one in size])
    chosen = large & (shared.readings.cohens_d()[POWER].abs() > effect)
    assert 0 < int(chosen.sum()) < int(large.sum())
    shift = torch.where(chosen, difference, 0.0)
    method = dpn_le(shared, quantile=quantile, effect=effect)
    with inputs_changed(model, [lambda x, s=each: x - 2 * s for each in shift]):
        wanted = logits(model, ids())
    torch.testing.assert_close(logits(model, ids(), method, {"power": -2.0}), wanted, atol=1e-3, rtol=1e-3)


def test_dpn_le_says_where_no_neuron_has_the_wanted_effect() -> None:
    method = dpn_le(evidence(), quantile=0.9, effect=1e6)
    assert method.notes["without_effect_size"] == VALUES
    assert all(count > 0 for count in method.notes["neurons"].values())  # type: ignore[attr-defined]
