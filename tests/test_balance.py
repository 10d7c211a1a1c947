"""Leakage-aware selection: the samples stand for the KL divergence, and what must stay still stays still."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SCENARIOS, TEXTS, VALUES, tiny_reader, tiny_tokenizer

from neva_hf import NeVAError, NeVAModel, identify_neurons
from neva_hf.architectures import find_down_projections
from neva_hf.identify import (
    Statistics,
    balanced_neurons,
    balanced_scores,
    balanced_shifts,
    collect,
    fisher_samples,
    top_neurons,
)
from neva_hf.identify.balance import constraints, diagonal
from neva_hf.measure import damage
from neva_hf.scenarios import scenario_values

LAYERS = [0, 1]


@pytest.fixture(scope="module")
def found() -> tuple[Statistics, torch.Tensor]:
    """Statistics and samples of a tiny model."""
    model, tokenizer = tiny_reader(), tiny_tokenizer()
    statistics = collect(model, tokenizer, SCENARIOS, scenario_values(SCENARIOS))
    return statistics, fisher_samples(model, tokenizer, TEXTS, samples=256)


def test_half_the_quadratic_form_of_the_samples_is_the_kl_divergence_of_a_small_shift() -> None:
    model, tokenizer = tiny_reader(), tiny_tokenizer()
    samples = fisher_samples(model, tokenizer, TEXTS, samples=4000)
    neuron_map = identify_neurons(
        model, tokenizer, SCENARIOS, values=VALUES, neurons=12, neutral_texts=TEXTS, leakage_penalty=0.0
    )
    edited = NeVAModel.from_map(model, neuron_map)
    strengths = [{value: 0.2} for value in VALUES]
    measured = damage(edited, tokenizer, TEXTS, strengths)
    names = list(find_down_projections(edited))
    for row, (value, cost) in enumerate(zip(VALUES, measured, strict=True)):
        shift = torch.zeros(samples.shape[1:])
        for layer, name in enumerate(names):
            edits = neuron_map.modules.get(name.removeprefix("base_model.model."))
            if edits is not None:
                shift[layer, edits.index.long()] = edits.shift[row]
        shift *= 0.2 * neuron_map.config.units[value][1]
        predicted = (samples.flatten(1) @ shift.flatten()).square().mean() / 2
        assert predicted == pytest.approx(cost.kl, rel=0.25)


def test_the_samples_are_the_same_for_the_same_seed_and_leave_the_model_as_it_was() -> None:
    model, tokenizer = tiny_reader(), tiny_tokenizer()
    ids = torch.tensor([[3, 4, 5, 6]])
    before = model(ids).logits
    first = fisher_samples(model, tokenizer, TEXTS, samples=6)
    assert torch.equal(first, fisher_samples(model, tokenizer, TEXTS, samples=6))
    assert not torch.equal(first, fisher_samples(model, tokenizer, TEXTS, samples=6, seed=1))
    assert torch.equal(before, model(ids).logits)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_numbers_are_drawn_where_the_model_is_by_a_generator_of_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[Any, Any, int]] = []
    randn = torch.randn

    def watched(*shape: Any, generator: torch.Generator, device: torch.device) -> torch.Tensor:
        drawn.append((device, generator.device, generator.initial_seed()))
        return randn(*shape, generator=generator, device=device)

    monkeypatch.setattr(torch, "randn", watched)
    fisher_samples(tiny_reader(), tiny_tokenizer(), TEXTS, samples=6, rows=1, seed=2)
    cpu = torch.device("cpu")
    assert drawn == [(cpu, cpu, 2 * 1_000_003 + number) for number in range(3) for _ in range(2)]


def test_interrupted_samples_end_as_the_same_samples_bit_for_bit(tmp_path: Path) -> None:
    model, tokenizer = tiny_reader(), tiny_tokenizer()
    whole = fisher_samples(model, tokenizer, TEXTS, samples=48, rows=2)
    passes: list[int] = []

    def breaking(items: Any, what: str) -> Any:
        for number, item in enumerate(items):
            if number == 5:
                raise KeyboardInterrupt
            yield item

    def counting(items: Any, what: str) -> Any:
        passes.append(len(items))
        return items

    with pytest.raises(KeyboardInterrupt):
        fisher_samples(
            model,
            tokenizer,
            TEXTS,
            samples=48,
            rows=2,
            checkpoint=tmp_path / "f",
            checkpoint_every=2,
            progress=breaking,
        )
    resumed = fisher_samples(model, tokenizer, TEXTS, samples=48, rows=2, checkpoint=tmp_path / "f", progress=counting)
    assert passes == [8]
    assert torch.equal(whole, resumed)
    other = fisher_samples(model, tokenizer, TEXTS, samples=48, rows=2, seed=1, checkpoint=tmp_path / "f")
    assert not torch.equal(whole, other)


def test_of_neurons_that_do_the_same_only_one_is_chosen() -> None:
    # Neurons 0 and 1 are one and the same; 2 is weaker but adds something of its own.
    statistics = Statistics.zeros(["a"], ["layer"], 4)
    statistics.gradient[0, 0] = torch.tensor([1.0, 1.0, 0.6, 0.0])
    statistics.count += 1
    random = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
    samples = torch.stack([random[:, 0], random[:, 0], random[:, 1], random[:, 2]], dim=1)[:, None]
    assert top_neurons(balanced_scores(statistics, samples, 1, 1.0, [0]), 2, [0])[0, 0].tolist() == [
        True,
        True,
        False,
        False,
    ]
    chosen, shifts = balanced_neurons(statistics, samples, 1, 2, 1.0, [0])
    assert chosen[0, 0, :2].sum() == 1
    assert bool(chosen[0, 0, 2])
    assert torch.equal(shifts != 0, chosen)


def test_the_shifts_are_those_of_the_chosen_neurons_alone(found: tuple[Statistics, torch.Tensor]) -> None:
    statistics, samples = found
    chosen, shifts = balanced_neurons(statistics, samples, 2, 10, 1.0, LAYERS)
    assert chosen.flatten(1).sum(1).tolist() == [10, 10]
    torch.testing.assert_close(shifts, balanced_shifts(statistics, samples, chosen, 1.0, LAYERS))


def test_texts_without_tokens_are_refused() -> None:
    with pytest.raises(NeVAError, match="fewer than two tokens"):
        fisher_samples(tiny_reader(), tiny_tokenizer(), [""])


def test_a_large_penalty_holds_every_other_margin_still_to_first_order(
    found: tuple[Statistics, torch.Tensor],
) -> None:
    statistics, samples = found
    scores = balanced_scores(statistics, samples, len(statistics.values), 1e5, LAYERS)
    chosen = top_neurons(scores, 40, LAYERS)
    strict = balanced_shifts(statistics, samples, chosen, 1e5, LAYERS)
    loose = balanced_shifts(statistics, samples, chosen, 1e-5, LAYERS)
    for target in range(len(statistics.values)):
        slope, others = constraints(statistics, target)
        assert (slope * strict[target]).sum() > 0
        leaks = (others * strict[target]).sum((1, 2)).abs().max()
        before = (others * loose[target]).sum((1, 2)).abs().max()
        assert leaks < 1e-2 * before
        assert bool((strict[target][~chosen[target]] == 0).all())


def test_without_a_penalty_the_shift_is_the_natural_gradient(found: tuple[Statistics, torch.Tensor]) -> None:
    statistics, samples = found
    chosen = torch.zeros(1, *samples.shape[1:], dtype=torch.bool)
    chosen[0, 1, :5] = True
    shift = balanced_shifts(statistics, samples, chosen, 1e-9, LAYERS)[0, 1, :5]
    picked = samples[:, 1, :5]
    fisher = (picked.T @ picked / len(picked) + diagonal(samples, LAYERS)[1, :5].diag()) / 2
    torch.testing.assert_close(shift, torch.linalg.solve(fisher, statistics.mean_gradient()[0, 1, :5]))


def test_closed_layers_neither_score_for_the_target_nor_against_it(found: tuple[Statistics, torch.Tensor]) -> None:
    statistics, samples = found
    scores = balanced_scores(statistics, samples, 2, 1.0, [1])
    assert scores.shape == (2, *samples.shape[1:])
    assert bool((scores[:, 0] == 0).all())
    assert bool((scores[:, 1] > 0).any())


def test_a_rise_of_the_target_is_not_read_as_a_fall_of_the_others() -> None:
    # One neuron that raises the target's reply alone, by 1: every other margin falls by 1/3, but nothing leaks.
    values = ["a", "b", "c", "d"]
    statistics = Statistics.zeros(values, ["layer"], 1)
    statistics.gradient[:, 0, 0] = torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3])
    statistics.count += 1
    statistics.rivals += 3
    slope, others = constraints(statistics, 0)
    assert float(slope) == 1
    torch.testing.assert_close(others.flatten(), torch.zeros(3))


def test_a_trait_held_against_its_own_opposite_keeps_its_slope() -> None:
    statistics = Statistics.zeros(["a", "b"], ["layer"], 1)
    statistics.gradient[:, 0, 0] = torch.tensor([1.0, 0.5])
    statistics.count += 1
    assert float(constraints(statistics, 0)[1]) == 0.5


def test_a_penalty_lowers_the_leakage_that_is_measured() -> None:
    from neva_hf.measure import margins, scenario_log_probs

    model, tokenizer = tiny_reader(), tiny_tokenizer()
    everyone = scenario_values(SCENARIOS)
    leaks = {}
    for penalty in (0.0, 100.0):
        found = identify_neurons(
            model, tokenizer, SCENARIOS, neurons=60, neutral_texts=TEXTS, leakage_penalty=penalty, target_kl=0.01
        )
        assert found.config.provenance["leakage_penalty"] == penalty
        edited = NeVAModel.from_map(model, found)
        base = scenario_log_probs(edited, tokenizer, SCENARIOS)
        total = own = 0.0
        for target in everyone:
            with edited.strengths({target: 1.0}):
                after = scenario_log_probs(edited, tokenizer, SCENARIOS)
            for value in everyone:
                left_out = () if value == target else (target,)
                shift = sum(margins(after, value, left_out)) - sum(margins(base, value, left_out))
                own, total = (own + shift, total) if value == target else (own, total + max(shift, 0.0))
        assert own > 0
        leaks[penalty] = total / own
        edited.unload()
    assert leaks[100.0] < leaks[0.0]


@pytest.mark.parametrize("penalty", [-1.0, float("nan"), float("inf")])
def test_a_penalty_that_is_none_is_refused(penalty: float) -> None:
    with pytest.raises(NeVAError, match="leakage_penalty"):
        identify_neurons(tiny_reader(), tiny_tokenizer(), SCENARIOS, neurons=8, leakage_penalty=penalty)
