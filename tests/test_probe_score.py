"""Value probes: their sums are what slow computations give, and a neuron's score is its own part in the logit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from tiny import ARCHITECTURES, D_FF, HIDDEN, LAYERS, SCENARIOS, VALUES, tiny_reader, tiny_tokenizer
from torch import nn
from transformers import PreTrainedModel

from neva_hf import NeVAError, Scenario
from neva_hf.architectures import find_down_projections
from neva_hf.identify import SCORES, Statistics, collect, top_neurons
from neva_hf.identify.probe import value_probes, with_logits_per_unit
from neva_hf.measure import contrast
from neva_hf.prompts import format_prompt, format_reply
from neva_hf.scenarios import scenarios_hash

MODULES = [f"m{layer}" for layer in range(LAYERS)]

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
some_architectures = pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "opt"])


def probed(model: PreTrainedModel | None = None, scenarios: list[Scenario] = SCENARIOS, **options: Any) -> Statistics:
    return collect(model or tiny_reader(), tiny_tokenizer(), scenarios, VALUES, probes=True, **options)


@torch.no_grad()
def slow_means(model: PreTrainedModel, scenario: Scenario) -> torch.Tensor:
    """The mean output of each down projection over each reply's tokens that tell another one, `[replies, L, H]`."""
    tokenizer, found = tiny_tokenizer(), []
    for key, reply in scenario.replies.items():
        texts = format_prompt(tokenizer, scenario.question), format_reply(tokenizer, reply)
        prompt, count = (len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts)
        seen: list[torch.Tensor] = []
        handles = [
            module.register_forward_hook(
                lambda _, __, out, to=seen: to.append(out.reshape(-1, out.shape[-1]).double())
            )
            for module in find_down_projections(model).values()
        ]
        reference.log_probs(model, tokenizer, Scenario(scenario.question, {key: reply, "other": "-"}))
        for handle in handles:
            handle.remove()
        found.append(torch.stack([y[prompt : prompt + count - 1].mean(0) for y in seen[:LAYERS]]))
    return torch.stack(found)


def synthetic(replies: torch.Tensor) -> Statistics:
    """Sums of replies `[scenarios, values, H]`, one of every value, in a model of one layer."""
    values = [f"v{row}" for row in range(replies.shape[1])]
    found = Statistics.zeros(values, ["m0"], 1, hidden=replies.shape[2])
    assert found.written is not None
    assert found.scatter is not None
    for scenario in replies.double():
        for row, value in enumerate(values):
            found.written[row, 0] += torch.tensor(contrast(values, value), dtype=torch.float64) @ scenario
        found.scatter[0] += scenario.T.cov().float()
    found.count += len(replies)
    found.scenarios += len(replies)
    return found


# The sums


@each_architecture
def test_the_sums_for_probes_are_those_of_what_slow_passes_write(architecture: str) -> None:
    model = tiny_reader(architecture)
    statistics = probed(model)
    written, scatter = torch.zeros(len(VALUES), LAYERS, HIDDEN).double(), torch.zeros(LAYERS, HIDDEN, HIDDEN).double()
    for scenario in SCENARIOS:
        means = slow_means(model, scenario)
        for layer in range(LAYERS):
            scatter[layer] += means[:, layer].T.cov()
        for row, value in enumerate(VALUES):
            weights = contrast(list(scenario.replies), value)
            if weights is not None:
                written[row] += torch.einsum("r,rlh->lh", torch.tensor(weights).double(), means)
    torch.testing.assert_close(statistics.written, written, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(statistics.scatter, scatter.float(), rtol=1e-3, atol=1e-5)


def test_the_sums_of_two_halves_add_up_to_those_of_the_whole() -> None:
    whole, added = probed(), Statistics.zeros(VALUES, list(find_down_projections(tiny_reader())), D_FF, HIDDEN)
    for half in (SCENARIOS[:1], SCENARIOS[1:]):
        added.add(probed(scenarios=half))
    assert added.written is not None
    assert added.scatter is not None
    torch.testing.assert_close(added.written, whole.written, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(added.scatter, whole.scatter, rtol=1e-5, atol=1e-6)


def test_sums_with_and_without_probes_are_not_added() -> None:
    names = list(find_down_projections(tiny_reader()))
    for one, other in ((None, HIDDEN), (HIDDEN, None)):
        with pytest.raises(NeVAError, match="with the sums for value probes or gains and statistics without them"):
            Statistics.zeros(VALUES, names, D_FF, one).add(Statistics.zeros(VALUES, names, D_FF, other))


def test_what_was_read_off_the_model_is_no_sum_and_is_dropped_when_sums_change() -> None:
    statistics = with_logits_per_unit(tiny_reader(), probed())
    assert {"written", "scatter"} < statistics.tensors().keys()
    assert "logit_per_unit" not in statistics.tensors()
    statistics.add(probed())
    assert statistics.logit_per_unit is None


def test_without_probes_nothing_is_kept_for_them_and_the_other_sums_are_the_same_bit_for_bit() -> None:
    without, with_them = collect(tiny_reader(), tiny_tokenizer(), SCENARIOS, VALUES), probed()
    assert without.written is without.scatter is without.logit_per_unit is None
    theirs = with_them.tensors()
    assert theirs.keys() - without.tensors().keys() == {"written", "scatter"}
    for name, tensor in without.tensors().items():
        assert torch.equal(tensor, theirs[name]), name


def test_memory_does_not_grow_with_the_number_of_scenarios() -> None:
    sizes = [
        {name: tensor.shape for name, tensor in probed(scenarios=many).tensors().items()}
        for many in (SCENARIOS, SCENARIOS * 4)
    ]
    assert sizes[0] == sizes[1]
    assert sizes[0]["scatter"] == (LAYERS, HIDDEN, HIDDEN)


def test_half_precision_outputs_are_summed_in_full_precision() -> None:
    model = tiny_reader().bfloat16()
    seen: list[torch.Tensor] = []
    module = find_down_projections(model)["model.layers.1.mlp.down_proj"]
    handle = module.register_forward_hook(lambda _, __, out: seen.append(out.detach().double()))
    scenario = Scenario("Why?", {"power": "I want it " * 20, "security": "it is safe " * 20})
    statistics = collect(model, tiny_tokenizer(), [scenario], ["power"], probes=True)
    handle.remove()
    tokenizer = tiny_tokenizer()
    texts = [format_reply(tokenizer, reply) for reply in scenario.replies.values()]
    counts = [len(tokenizer(text, add_special_tokens=False).input_ids) - 1 for text in texts]
    own, other = (row[:count].mean(0) for row, count in zip(seen[1], counts, strict=True))
    assert statistics.written is not None
    torch.testing.assert_close(statistics.written[0, 1], own - other, rtol=1e-5, atol=1e-6)


def test_a_pass_with_probes_leaves_no_hook_behind() -> None:
    model = tiny_reader()
    probed(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# Checkpoints


class Interrupted(Exception):
    pass


def breaking(items: Iterable[Any], what: str) -> Iterator[Any]:
    for number, item in enumerate(items):
        if number == 7:
            raise Interrupted
        yield item


def test_an_interrupted_pass_with_probes_ends_with_the_same_sums_bit_for_bit(tmp_path: Path) -> None:
    many, kept = SCENARIOS * 5, {"checkpoint": tmp_path / "pass", "checkpoint_every": 2}
    with pytest.raises(Interrupted):
        probed(scenarios=many, progress=breaking, **kept)
    seen: list[int] = []

    def counting(items: Any, what: str) -> Any:
        seen.append(len(items))
        return items

    resumed, whole = probed(scenarios=many, progress=counting, **kept).tensors(), probed(scenarios=many).tensors()
    assert seen == [len(many) - 6]
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("first", [True, False])
def test_a_checkpoint_with_probes_and_a_pass_without_them_do_not_mix(first: bool, tmp_path: Path) -> None:
    model, tokenizer = tiny_reader(), tiny_tokenizer()
    kept: dict[str, Any] = {"checkpoint": tmp_path / "pass", "checkpoint_every": 1}
    collect(model, tokenizer, SCENARIOS, VALUES, probes=first, **kept)
    got = collect(model, tokenizer, SCENARIOS, VALUES, probes=not first, **kept).tensors()
    wanted = collect(model, tokenizer, SCENARIOS, VALUES, probes=not first).tensors()
    assert got.keys() == wanted.keys()
    assert all(torch.equal(tensor, got[name]) for name, tensor in wanted.items())


def test_checkpoints_without_probes_that_older_versions_wrote_are_taken_up() -> None:
    from neva_hf.identify.checkpoint import checkpoint_key

    key = checkpoint_key("someone/tiny", SCENARIOS, Statistics.zeros(VALUES, MODULES, D_FF))
    assert json.loads(key) == ["someone/tiny", scenarios_hash(SCENARIOS), VALUES, MODULES, [0, 1]]


# The probes


def test_a_probe_is_the_ridge_regression_from_what_is_written_to_the_contrast() -> None:
    replies = torch.randn(7, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    statistics, shrinkage = synthetic(replies), 0.3
    assert statistics.scatter is not None
    rows = (replies - replies.mean(1, keepdim=True)).flatten(0, 1)
    for row, value in enumerate(statistics.values):
        target = torch.tensor(contrast(statistics.values, value)).double().repeat(7)
        # lambda of the mean covariance is so much of the sum of squares:
        ridge = 7 * 3 * shrinkage * (statistics.scatter[0] / 7).diagonal().mean().double()
        stacked = torch.cat([rows, ridge.sqrt() * torch.eye(5).double()])
        solution = torch.linalg.lstsq(stacked, torch.cat([target, torch.zeros(5).double()])[:, None]).solution[:, 0]
        # (it holds the value's reply at 1 above 0; the discriminant's logit differs by a factor alone)
        torch.testing.assert_close(
            value_probes(statistics, shrinkage)[row, 0], 3 * solution.float(), rtol=1e-4, atol=1e-5
        )


def test_probes_tell_synthetic_values_apart_where_their_mean_difference_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    width, count = 24, 400
    # What differs between values is small beside what differs between replies anyhow, in other directions.
    noise = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q @ torch.diag(
        torch.logspace(-1, 1, width)
    )
    centres = torch.randn(3, width, generator=generator) * 0.5

    def drawn() -> torch.Tensor:
        questions = 10 * torch.randn(count, 1, width, generator=generator)
        return questions + centres + torch.randn(count, 3, width, generator=generator) @ noise.T

    statistics, held_out = synthetic(drawn()), drawn()
    assert statistics.written is not None

    def accuracy(weights: torch.Tensor) -> float:
        logits = torch.einsum("vh,srh->vsr", weights, held_out)
        hits = [logits[v, :, v, None] > logits[v][:, [r for r in range(3) if r != v]] for v in range(3)]
        return float(torch.stack(hits).float().mean())

    assert accuracy(value_probes(statistics, 1e-3)[:, 0]) > 0.95
    assert accuracy(statistics.written[:, 0].float()) < 0.85


def test_a_layer_that_always_writes_the_same_gets_a_probe_of_zeros() -> None:
    found = value_probes(synthetic(torch.ones(3, 2, 4)))
    assert torch.equal(found, torch.zeros(2, 1, 4))


# The score


@each_architecture
def test_the_scores_of_a_layer_add_up_to_the_difference_of_its_probes_logits(architecture: str) -> None:
    model = tiny_reader(architecture)
    statistics = with_logits_per_unit(model, probed(model))
    assert statistics.written is not None
    means = (statistics.written / statistics.count[:, None, None]).float()
    wanted = (value_probes(statistics) * means).sum(-1)
    scored = SCORES["probe"](statistics)
    torch.testing.assert_close(scored.score.sum(-1), wanted, rtol=1e-3, atol=1e-5)
    assert (wanted > 0).all()
    assert torch.equal(scored.shift, statistics.mean_difference())


@some_architectures
def test_what_a_unit_adds_is_what_the_layer_does_with_one_more_of_the_neuron(architecture: str) -> None:
    model = tiny_reader(architecture).double()
    statistics = with_logits_per_unit(model, probed(model))
    assert statistics.logit_per_unit is not None
    probes = value_probes(statistics).double()
    x = torch.randn(1, D_FF, generator=torch.Generator().manual_seed(0)).double()
    for layer, module in enumerate(find_down_projections(model).values()):
        for neuron in (0, 17, D_FF - 1):
            more = x.clone()
            more[0, neuron] += 1
            with torch.no_grad():
                moved = (module(more) - module(x))[0]
            torch.testing.assert_close(
                statistics.logit_per_unit[:, layer, neuron].double(), probes[:, layer] @ moved, rtol=1e-4, atol=1e-5
            )


def test_layers_whose_weights_cannot_be_read_give_the_same_by_running_them() -> None:
    class Opaque(nn.Linear):
        """As quantized layers: a subclass, whose weight is not taken for the whole truth."""

    model = tiny_reader()
    statistics = probed(model)
    wanted = with_logits_per_unit(model, statistics).logit_per_unit
    for module in find_down_projections(model).values():
        module.__class__ = Opaque
    got = with_logits_per_unit(model, statistics).logit_per_unit
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_neurons_that_work_against_the_probe_are_not_chosen() -> None:
    statistics = Statistics.zeros(["power"], ["m0"], 4)
    statistics.count += 2
    statistics.difference += torch.tensor([2.0, -2.0, 2.0, -4.0])
    statistics.logit_per_unit = torch.tensor([[[3.0, 5.0, -1.0, -2.0]]])
    scored = SCORES["probe"](statistics)
    assert scored.score.tolist() == [[[3.0, -5.0, -1.0, 4.0]]]
    assert scored.shift.tolist() == [[[1.0, -1.0, 1.0, -2.0]]]
    assert top_neurons(scored.score, 4, [0]).tolist() == [[[True, False, False, True]]]


def test_the_given_statistics_stay_as_they_were() -> None:
    statistics = probed()
    found = with_logits_per_unit(tiny_reader(), statistics)
    assert statistics.logit_per_unit is None
    assert found.scatter is statistics.scatter


# What is refused


def test_the_score_says_what_it_misses() -> None:
    without = collect(tiny_reader(), tiny_tokenizer(), SCENARIOS, VALUES)
    with pytest.raises(NeVAError, match=r"neither their sums nor what each neuron adds.*collect with probes=True"):
        SCORES["probe"](without)
    with pytest.raises(
        NeVAError, match=r"no word on what each neuron adds.*with_logits_per_unit\(model, statistics\)"
    ):
        SCORES["probe"](probed())


def test_probes_are_refused_without_their_sums_without_shrinkage_and_on_another_model() -> None:
    without = collect(tiny_reader(), tiny_tokenizer(), SCENARIOS, VALUES)
    with pytest.raises(NeVAError, match="no sums for value probes: collect them with probes=True"):
        with_logits_per_unit(tiny_reader(), without)
    for shrinkage in (0.0, -1.0, float("nan")):
        with pytest.raises(NeVAError, match="`shrinkage` must be above 0"):
            value_probes(probed(), shrinkage)
    with pytest.raises(NeVAError, match="of another model"):
        with_logits_per_unit(tiny_reader("gpt2"), probed())
