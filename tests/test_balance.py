"""Leakage-aware selection: the samples stand for the KL divergence, and what must stay still stays still."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import D_FF, SCENARIOS, TEXTS, VALUES, tiny_reader, tiny_tokenizer

from neva_hf import NeuronMap, NeVAError, NeVAModel, identify_neurons
from neva_hf.architectures import find_down_projections
from neva_hf.identify import (
    Statistics,
    balanced_edits,
    balanced_neurons,
    balanced_scores,
    collect,
    fisher_samples,
    reply_samples,
    top_neurons,
)
from neva_hf.identify.balance import constraints, diagonal
from neva_hf.measure import damage, encode, grouped_logits
from neva_hf.module_edits import ModuleEdits
from neva_hf.scenarios import scenario_values

LAYERS = [0, 1]
SHAPE = (len(LAYERS), D_FF)


@pytest.fixture(scope="module", params=[False, True], ids=["shifts", "shifts and gains"])
def found(request: pytest.FixtureRequest) -> tuple[Statistics, torch.Tensor]:
    """Statistics and samples of a tiny model."""
    model, tokenizer = tiny_reader(), tiny_tokenizer()
    statistics = collect(model, tokenizer, SCENARIOS, scenario_values(SCENARIOS), gains=request.param)
    return statistics, fisher_samples(model, tokenizer, TEXTS, samples=256, gains=request.param)


@pytest.mark.parametrize("kind", ["shift", "gain"])
def test_half_the_quadratic_form_of_the_samples_is_the_kl_divergence_of_a_small_edit(kind: str) -> None:
    model, tokenizer = tiny_reader(), tiny_tokenizer()
    # (one text, so that samples and divergence are of the same tokens)
    texts = [max(TEXTS, key=lambda text: len(tokenizer(text)["input_ids"]))]
    samples = fisher_samples(model, tokenizer, texts, samples=4000, gains=True)
    neuron_map = identify_neurons(
        model, tokenizer, SCENARIOS, values=VALUES, neurons=12, neutral_texts=TEXTS, leakage_penalty=0.0
    )
    if kind == "gain":
        # The same numbers as gains, so that shifts are 0 and each activation is multiplied by 1 + gain.
        modules = {
            name: ModuleEdits(edits.index, torch.zeros_like(edits.shift), edits.shift)
            for name, edits in neuron_map.modules.items()
        }
        neuron_map = NeuronMap(replace(neuron_map.config, use_gain=True), modules)
    edited = NeVAModel.from_map(model, neuron_map)
    strength = {"shift": 0.2, "gain": 0.05}[kind]
    strengths = [{value: strength} for value in VALUES]
    measured = damage(edited, tokenizer, texts, strengths)
    names = list(find_down_projections(edited))
    for row, (value, cost) in enumerate(zip(VALUES, measured, strict=True)):
        done = torch.zeros(samples.shape[1:])
        for layer, name in enumerate(names):
            edits = neuron_map.modules.get(name.removeprefix("base_model.model."))
            if edits is not None:
                for part, numbers in enumerate((edits.shift, edits.gain)):
                    if numbers is not None:
                        done[part, layer, edits.index.long()] = numbers[row]
        done *= strength * neuron_map.config.units[value][1]
        predicted = (samples.flatten(1) @ done.flatten()).square().mean() / 2
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


@pytest.mark.parametrize("of", ["neutral text", "replies"])
def test_interrupted_samples_end_as_the_same_samples_bit_for_bit(of: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_reader(), tiny_tokenizer()
    everything = torch.ones(len(VALUES), *SHAPE, dtype=torch.bool)
    scenarios = [SCENARIOS[number % len(SCENARIOS)] for number in range(12)]

    def drawn(**given: Any) -> torch.Tensor:
        if of == "replies":
            return reply_samples(model, tokenizer, scenarios, VALUES, everything, gains=True, **given).samples
        return fisher_samples(model, tokenizer, TEXTS, samples=48, rows=2, gains=True, **given)

    whole = drawn()
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
        drawn(checkpoint=tmp_path / "f", checkpoint_every=2, progress=breaking)
    assert torch.equal(whole, drawn(checkpoint=tmp_path / "f", progress=counting))
    assert passes == [8]
    assert not torch.equal(whole, drawn(checkpoint=tmp_path / "f", seed=1))


def test_of_neurons_that_do_the_same_only_one_is_chosen() -> None:
    # Neurons 0 and 1 are one and the same; 2 is weaker but adds something of its own.
    statistics = Statistics.zeros(["a"], ["layer"], 4)
    statistics.gradient[0, 0] = torch.tensor([1.0, 1.0, 0.6, 0.0])
    statistics.count += 1
    random = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
    samples = torch.stack([random[:, 0], random[:, 0], random[:, 1], random[:, 2]], dim=1)[:, None, None]
    assert top_neurons(balanced_scores(statistics, samples, 1, 1.0, [0]), 2, [0])[0, 0].tolist() == [
        True,
        True,
        False,
        False,
    ]
    chosen, edits = balanced_neurons(statistics, samples, 1, 2, 1.0, [0])
    assert chosen[0, 0, :2].sum() == 1
    assert bool(chosen[0, 0, 2])
    assert torch.equal(edits[:, 0] != 0, chosen)


def test_the_edits_are_those_of_the_chosen_neurons_alone(found: tuple[Statistics, torch.Tensor]) -> None:
    statistics, samples = found
    chosen, edits = balanced_neurons(statistics, samples, 2, 10, 1.0, LAYERS)
    assert chosen.flatten(1).sum(1).tolist() == [10, 10]
    torch.testing.assert_close(edits, balanced_edits(statistics, samples, chosen, 1.0, LAYERS))


def test_samples_of_replies_stand_for_what_an_edit_changes_in_them() -> None:
    model, tokenizer = tiny_reader(), tiny_tokenizer()
    scenario = next(one for one in SCENARIOS if set(VALUES) <= one.replies.keys())
    everything = torch.ones(len(VALUES), *SHAPE, dtype=torch.bool)
    samples = reply_samples(model, tokenizer, [scenario] * 256, VALUES, everything, gains=True).samples
    assert samples.shape[:3] == (len(VALUES), 512, 2)
    samples = samples.unflatten(-1, SHAPE)
    encoded = encode(tokenizer, scenario)
    with torch.no_grad():
        (before,) = grouped_logits(model, [encoded])
    module = list(find_down_projections(model).values())[1]
    for part, step in enumerate((0.3, 0.1)):
        edit = torch.zeros(samples.shape[2:])
        edit[part, 1, :20] = step

        def hook(_: Any, args: tuple[torch.Tensor], edit: torch.Tensor = edit[:, 1]) -> tuple[torch.Tensor]:
            # (of the replies, not of the prompt, which is run alone)
            return (args[0] + edit[0] + edit[1] * args[0],) if len(args[0]) > 1 else args

        handle = module.register_forward_pre_hook(hook)
        with torch.no_grad():
            (after,) = grouped_logits(model, [encoded])
        handle.remove()
        base = before.log_softmax(-1)
        kl = ((base.exp() * (base - after.log_softmax(-1))).sum(-1) * encoded.mask).sum(1) / encoded.mask.sum(1)
        for row, value in enumerate(VALUES):
            predicted = (samples[row].flatten(1) @ edit.flatten()).square().mean() / 2
            assert predicted == pytest.approx(float(kl[encoded.keys.index(value)]), rel=0.25)


def test_scenarios_without_a_reply_of_a_value_do_not_count_for_it() -> None:
    model, tokenizer = tiny_reader(), tiny_tokenizer()
    whole = next(one for one in SCENARIOS if set(VALUES) <= one.replies.keys())
    first = VALUES[0]
    replies = {key: text for key, text in whole.replies.items() if key != first}
    without = replace(whole, id="without", replies=replies)
    some = torch.zeros(len(VALUES), *SHAPE, dtype=torch.bool)
    some[:, :, 3:9] = True
    samples = reply_samples(model, tokenizer, [whole, without], VALUES, some).samples
    assert bool((samples[0, 2:] == 0).all())
    alone = reply_samples(model, tokenizer, [whole], VALUES, some).samples
    torch.testing.assert_close(samples[0].square().mean(0), alone[0].square().mean(0))
    assert bool((samples[1].abs().amax((1, 2)) > 0).all())


def test_samples_of_replies_are_of_the_neurons_that_they_were_taken_for() -> None:
    model, tokenizer = tiny_reader(), tiny_tokenizer()
    everything = torch.ones(len(VALUES), *SHAPE, dtype=torch.bool)
    some = torch.zeros_like(everything)
    some[0, 0, :4], some[1, 1, 5:7] = True, True
    whole, part = (reply_samples(model, tokenizer, SCENARIOS, VALUES, one, gains=True) for one in (everything, some))
    for value, index in ((0, torch.tensor([1, 3])), (1, torch.tensor([SHAPE[1] + 5]))):
        assert torch.equal(part.at(value, index), whole.at(value, index))
        assert part.at(value, index).shape[1] == 2 * len(index)
    with pytest.raises(NeVAError, match="no samples of some of these neurons"):
        part.at(0, torch.tensor([2, 5]))
    with pytest.raises(NeVAError, match="no samples of some of these neurons"):
        part.at(1, torch.tensor([SHAPE[1] + 9]))


def test_what_an_edit_changes_in_the_own_replies_is_charged(found: tuple[Statistics, torch.Tensor]) -> None:
    statistics, samples = found
    model, tokenizer = tiny_reader(), tiny_tokenizer()
    gains, shape = samples.shape[1] == 2, samples.shape[2:]
    everything = torch.ones(len(statistics.values), *shape, dtype=torch.bool)
    own = reply_samples(model, tokenizer, SCENARIOS, statistics.values, everything, gains=gains)
    free, _ = balanced_neurons(statistics, samples, 2, 10, 1.0, LAYERS)
    loose = balanced_edits(statistics, samples, free, 1.0, LAYERS)
    strict = balanced_edits(statistics, samples, free, 1.0, LAYERS, own)
    for target in range(2):
        slope, _ = constraints(statistics, target)

        def changed(edit: torch.Tensor, slope: torch.Tensor = slope, row: int = target) -> float:
            # (at the same effect on the target)
            scaled = edit / (edit * slope).sum()
            return float((own.at(row, torch.arange(shape.numel())) @ scaled.flatten()).square().mean())

        assert changed(strict[target]) < changed(loose[target])


def test_texts_without_tokens_are_refused() -> None:
    with pytest.raises(NeVAError, match="fewer than two tokens"):
        fisher_samples(tiny_reader(), tiny_tokenizer(), [""])


def test_a_large_penalty_holds_every_other_margin_still_to_first_order(
    found: tuple[Statistics, torch.Tensor],
) -> None:
    statistics, samples = found
    scores = balanced_scores(statistics, samples, len(statistics.values), 1e5, LAYERS)
    chosen = top_neurons(scores, 40, LAYERS)
    strict = balanced_edits(statistics, samples, chosen, 1e5, LAYERS)
    loose = balanced_edits(statistics, samples, chosen, 1e-5, LAYERS)
    for target in range(len(statistics.values)):
        slope, others = constraints(statistics, target)
        assert (slope * strict[target]).sum() > 0
        leaks = (others * strict[target]).sum((1, 2, 3)).abs().max()
        before = (others * loose[target]).sum((1, 2, 3)).abs().max()
        assert leaks < 1e-2 * before
        assert bool((strict[target][:, ~chosen[target]] == 0).all())


def test_without_a_penalty_the_edit_is_the_natural_gradient(found: tuple[Statistics, torch.Tensor]) -> None:
    statistics, samples = found
    chosen = torch.zeros(1, *samples.shape[2:], dtype=torch.bool)
    chosen[0, 1, :5] = True
    edit = balanced_edits(statistics, samples, chosen, 1e-9, LAYERS)[0, :, 1, :5].flatten()
    picked = samples[:, :, 1, :5].flatten(1)
    fisher = (picked.T @ picked / len(picked) + diagonal(samples, LAYERS)[:, 1, :5].flatten().diag()) / 2
    slope = statistics.mean_gradients()[0, :, 1, :5].flatten()
    torch.testing.assert_close(edit, torch.linalg.solve(fisher, slope), rtol=1e-4, atol=1e-5)


def test_closed_layers_neither_score_for_the_target_nor_against_it(found: tuple[Statistics, torch.Tensor]) -> None:
    statistics, samples = found
    scores = balanced_scores(statistics, samples, 2, 1.0, [1])
    assert scores.shape == (2, *samples.shape[2:])
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
