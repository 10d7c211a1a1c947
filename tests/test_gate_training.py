"""Trained gates: they tell a value's tokens from others, and the edit goes only as far as they ask for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from tiny import ARCHITECTURES, SCENARIOS, VALUES, batch, random_map, tiny_reader, tiny_tokenizer
from transformers import PreTrainedModel

from neva_hf import NeuronMap, NeVAError, NeVAModel, Scenario
from neva_hf.architectures import find_down_projections
from neva_hf.edit import add_general, general_edit
from neva_hf.identify import gate
from neva_hf.identify.collect import encode_replies
from neva_hf.identify.gate import GateSums, train_gates
from neva_hf.measure import contrast, reply_log_probs
from neva_hf.neuron_map import ModuleEdits
from neva_hf.prompts import format_reply

# Power and security have a few letters of their own, so that a token tells which it is.
APART = [
    Scenario(f"{asked}?", {"power": loud * 2, "security": calm * 2})
    for asked, loud, calm in [
        ("What", "ABBA", "xyyx"),
        ("Why", "BAABB", "yxx"),
        ("Who", "AABAB", "xxyxyy"),
        ("How", "BBA", "yyxy"),
    ]
]
HELD_OUT = [Scenario("Where?", {"power": "BABBAAAB", "security": "yxxxyyxy"})]

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def trained(neuron_map: NeuronMap, model: PreTrainedModel | None = None, **options: Any) -> NeuronMap:
    options = {"scenarios": SCENARIOS, **options}
    return train_gates(model or tiny_reader(), tiny_tokenizer(), neuron_map, **options)


def sparse_map(model: PreTrainedModel, **options: Any) -> NeuronMap:
    """A random map whose values leave some of the edited neurons alone, and one of them a whole module."""
    found = random_map(model, **options)
    for number, edits in enumerate(found.modules.values()):
        edits.shift[0, :2] = 0
        edits.shift[1, 3:] = 0
        if number == 0:
            edits.shift[2] = 0
    return found


@torch.no_grad()
def tokens_of(
    model: PreTrainedModel, neuron_map: NeuronMap, scenarios: list[Scenario]
) -> Iterator[tuple[int, str, dict[str, torch.Tensor]]]:
    """Per scenario, reply and module, the edited neurons at the reply's tokens: each reply by itself, without a cache."""
    tokenizer = tiny_tokenizer()
    for number, scenario in enumerate(scenarios):
        for key, reply in scenario.replies.items():
            only = Scenario(scenario.question, {key: reply, "other": "-"})
            seen: dict[str, torch.Tensor] = {}

            def hook(name: str, x: torch.Tensor, seen: dict[str, torch.Tensor] = seen) -> None:
                seen.setdefault(name, x.reshape(-1, x.shape[-1])[:, neuron_map.modules[name].index.long()].double())

            handles = [
                module.register_forward_pre_hook(lambda _, args, name=name: hook(name, args[0]))
                for name, module in find_down_projections(model).items()
            ]
            reference.log_probs(model, tokenizer, only)
            for handle in handles:
                handle.remove()
            count = len(tokenizer(format_reply(tokenizer, reply), add_special_tokens=False).input_ids)
            # (what was run ends with the reply's last token, which tells no other)
            yield number, key, {name: x[-count:-1] for name, x in seen.items()}


def classes(found: list[Any], scenarios: list[Scenario], name: str, value: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of the competing replies, and those of the value's, `[tokens, k]`."""
    others, own = [], []
    for number, key, seen in found:
        weights = contrast(list(scenarios[number].replies), value)
        if weights is not None:
            (own if key == value else others).append(seen[name])
    return torch.cat(others), torch.cat(own)


# What is learned


@each_architecture
def test_gates_are_the_discriminants_of_slowly_gathered_tokens(architecture: str) -> None:
    model = tiny_reader(architecture)
    neuron_map = sparse_map(model)
    gated = trained(neuron_map, model)
    found = list(tokens_of(model, neuron_map, SCENARIOS))
    for name, edits in gated.modules.items():
        assert edits.gate_weight is not None
        assert edits.gate_bias is not None
        for row, value in enumerate(VALUES):
            edited = edits.shift[row] != 0
            assert torch.equal(edits.gate_weight[row][~edited], torch.zeros(int((~edited).sum())))
            if not edited.any():
                assert edits.gate_bias[row] == 0
                continue
            others, own = (tokens[:, edited] for tokens in classes(found, SCENARIOS, name, value))
            # `cov` of a single neuron has no dimensions.
            within = sum(x.T.cov(correction=0).reshape(x.shape[1], -1) for x in (others, own)) / 2
            shrunk = 0.9 * within + 0.1 * within.diagonal().diag()
            weight = torch.linalg.solve(shrunk, own.mean(0) - others.mean(0))
            torch.testing.assert_close(edits.gate_weight[row][edited].double(), weight, rtol=2e-3, atol=1e-3)
            bias = -float(weight @ (own.mean(0) + others.mean(0))) / 2
            assert float(edits.gate_bias[row]) == pytest.approx(bias, rel=2e-3, abs=1e-3)


def test_the_logit_is_the_log_odds_of_normal_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, generator=generator).double()
    centre, gap = torch.randn(4, generator=generator).double(), torch.tensor([0.5, -1.0, 0.0, 0.3]).double()
    sums = GateSums.zeros(torch.arange(4))
    # Ten times as many tokens of the others: gates are for even odds all the same.
    for own, count in ((False, 200_000), (True, 20_000)):
        sums.add(centre + own * gap + torch.randn(count, 4, generator=generator).double() @ root.T, own)
    weight, bias = sums.discriminant(shrinkage=0.0)
    wanted = torch.linalg.solve(root @ root.T, gap)
    torch.testing.assert_close(weight, wanted, rtol=0.05, atol=0.05)
    assert float(bias) == pytest.approx(-float(wanted @ (centre + gap / 2)), rel=0.05, abs=0.05)


def test_the_logit_is_0_midway() -> None:
    sums = GateSums.zeros(torch.tensor([0, 2]))
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(50, 3, generator=generator).double() + by for by in (0, 1)]
    for own, x in enumerate(drawn):
        sums.add(x, bool(own))
    weight, bias = sums.discriminant()
    midway = (drawn[0].mean(0) + drawn[1].mean(0))[[0, 2]] / 2
    assert float(weight @ midway + bias) == pytest.approx(0, abs=1e-12)


def test_neurons_that_are_dead_get_no_weight() -> None:
    sums = GateSums.zeros(torch.arange(2))
    for own in (False, True):
        sums.add(torch.tensor([[0.0, own], [0.0, own + 1.0]]).double(), own)
    weight, bias = sums.discriminant()
    assert weight[0] == 0
    assert weight[1] > 0
    assert torch.isfinite(bias)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_gates_are_more_probable_on_the_values_own_tokens_of_replies_that_were_not_learned_from(
    architecture: str,
) -> None:
    model = tiny_reader(architecture)
    values = ["power", "security"]
    neuron_map = random_map(model, values=values, neurons=16)
    gated = trained(neuron_map, model, scenarios=APART)
    found = list(tokens_of(model, gated, HELD_OUT))
    for name, edits in gated.modules.items():
        assert edits.gate_weight is not None
        assert edits.gate_bias is not None
        for row, value in enumerate(values):
            others, own = classes(found, HELD_OUT, name, value)
            z = [x @ edits.gate_weight[row].double() + edits.gate_bias[row] for x in (others, own)]
            assert z[1].sigmoid().mean() > z[0].sigmoid().mean() + 0.2
        # Two values that are held against each other alone have opposite gates.
        torch.testing.assert_close(edits.gate_weight[0], -edits.gate_weight[1], rtol=1e-4, atol=1e-5)


def test_gained_neurons_count_as_edited() -> None:
    model = tiny_reader()
    neuron_map = random_map(model, gain=True)
    for edits in neuron_map.modules.values():
        edits.shift[:] = 0
    gated = trained(neuron_map, model)
    assert all(
        bool((edits.gate_weight != 0).all()) for edits in gated.modules.values() if edits.gate_weight is not None
    )


# Signs: a gate and its edit


def test_a_positive_strength_acts_where_the_value_is_not_yet_and_a_negative_one_where_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    others, own = (torch.randn(200, 3, generator=generator).double() * 0.2 + by for by in (-1, 1))
    sums = GateSums.zeros(torch.arange(3))
    sums.add(others, False)
    sums.add(own, True)
    weight, bias = sums.discriminant()
    shift = (own.mean(0) - others.mean(0))[None].float()
    assert float(weight.float() @ shift[0]) > 0
    x = torch.stack([others[0], own[0]])[None].float()
    moved = {}
    for strength in (1.0, -1.0):
        edit = general_edit(
            index=torch.arange(3),
            columns=torch.eye(3),
            coefficients=torch.tensor([[strength]]),
            shift=shift,
            gain=None,
            gate_weight=weight[None].float(),
            gate_bias=bias[None].float(),
            gate_logit=2.2,
            untouched=None,
            dtype=torch.float32,
        )
        moved[strength] = add_general(torch.zeros_like(x), x, edit)[0]
    there = torch.zeros(3)
    assert torch.equal(moved[1.0][1], there)
    assert torch.equal(moved[-1.0][0], there)
    # and no farther than the wanted logit
    for strength, token in ((1.0, 0), (-1.0, 1)):
        z = float((x[0, token] + moved[strength][token]) @ weight.float() + bias)
        assert strength * z == pytest.approx(2.2, rel=1e-3)


def test_gates_raise_their_logit_along_the_mean_difference_of_the_tokens() -> None:
    model = tiny_reader()
    neuron_map = random_map(model)
    found = list(tokens_of(model, neuron_map, SCENARIOS))
    for name, edits in neuron_map.modules.items():
        for row, value in enumerate(VALUES):
            others, own = classes(found, SCENARIOS, name, value)
            edits.shift[row] = (own.mean(0) - others.mean(0)).float()
    for edits in trained(neuron_map, model).modules.values():
        assert edits.gate_weight is not None
        assert ((edits.gate_weight * edits.shift).sum(-1) > 0).all()


# The map that comes out


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_gated_map_edits_like_slow_hooks_and_at_strength_0_not_at_all(architecture: str, tmp_path: Path) -> None:
    base = tiny_reader(architecture)
    gated = trained(random_map(base, units={"power": [0.5, 2.0]}), base)
    gated.save_pretrained(tmp_path)
    model = NeVAModel.from_pretrained(tiny_reader(architecture), tmp_path)
    inputs, strengths = batch(), {"power": 1.5, "security": -1.0}
    with torch.no_grad():
        wanted = base(**inputs).logits
        assert torch.equal(model(**inputs, strengths={}).logits, wanted)
        assert torch.equal(model(**inputs, strengths=dict.fromkeys(VALUES, 0.0)).logits, wanted)
        edited = model(**inputs, strengths=strengths).logits
        with reference.edited(base, (gated, strengths)):
            torch.testing.assert_close(edited, base(**inputs).logits, rtol=1e-3, atol=1e-3)
    assert not torch.equal(edited, wanted)


def test_with_the_gate_off_a_gated_map_is_the_map_without_gates_bit_for_bit() -> None:
    neuron_map = random_map(tiny_reader())
    gated = trained(neuron_map).apply_to(tiny_reader())
    plain = neuron_map.apply_to(tiny_reader())
    inputs, strengths = batch(), [{"power": 1.5}, {"security": -1.0}, {}]
    with torch.no_grad():
        wanted = plain(**inputs, strengths=strengths).logits
        assert torch.equal(gated(**inputs, strengths=strengths, gate=False).logits, wanted)
        assert not torch.equal(gated(**inputs, strengths=strengths).logits, wanted)


def test_only_gates_are_added_and_old_ones_replaced() -> None:
    model = tiny_reader()
    plain = random_map(
        model, units={"power": [0.5, 2.0]}, ranges={"power": [-2.0, 3.0]}, provenance={"method": "neva"}
    )
    before = copy.deepcopy(plain)
    again = trained(random_map(model, gate=True), model, probability=0.6)
    gated = trained(plain, model)
    assert plain.modules == before.modules
    assert not plain.config.use_gate
    for name, edits in gated.modules.items():
        assert replace(edits, gate_weight=None, gate_bias=None) == plain.modules[name]
        other = trained(replace_edits(again), model).modules[name]
        assert other == again.modules[name]
    told = gated.config.provenance
    assert told["method"] == "neva"
    assert told["gates"]["scenarios"] == len(SCENARIOS)
    wanted = before.config.to_dict() | {"use_gate": True, "provenance": told}
    assert gated.config.to_dict() == wanted
    assert (gated.config.gate_probability, again.config.gate_probability) == (0.9, 0.6)


def replace_edits(neuron_map: NeuronMap) -> NeuronMap:
    """The same map with other gates."""
    modules: dict[str, ModuleEdits] = {
        name: replace(edits, gate_weight=torch.ones_like(edits.shift), gate_bias=torch.ones(len(edits.shift)))
        for name, edits in neuron_map.modules.items()
    }
    return NeuronMap(neuron_map.config, modules)


# The pass


def test_the_sums_of_two_processes_add_up_to_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[list[torch.Tensor]] = []
    monkeypatch.setattr(gate, "add_up", lambda tensors: found.append([tensor.clone() for tensor in tensors]))
    neuron_map = random_map(tiny_reader())
    for which in (slice(None), slice(0, None, 2), slice(1, None, 2)):
        monkeypatch.setattr(gate, "share", lambda items, which=which: items[which])
        # (what one process makes of its share alone is not looked at)
        trained(neuron_map, scenarios=SCENARIOS[:2] * 2)
    whole, *parts = found
    for all_of_it, one, other in zip(whole, *parts, strict=True):
        torch.testing.assert_close(one + other, all_of_it, rtol=1e-12, atol=1e-12)


def test_gates_of_half_precision_models_are_summed_in_full_precision() -> None:
    model = tiny_reader().bfloat16()
    neuron_map = random_map(model)
    gated = trained(neuron_map, model)
    name, module = next(iter(find_down_projections(model).items()))
    index, sums = neuron_map.modules[name].index.long(), GateSums.zeros(torch.arange(6))
    for scenario in SCENARIOS:
        seen: list[torch.Tensor] = []
        handle = module.register_forward_pre_hook(lambda _, args, to=seen: to.append(args[0][..., index].double()))
        encoded = encode_replies(tiny_tokenizer(), scenario)
        with torch.no_grad():
            reply_log_probs(model, encoded)
        handle.remove()
        weights = contrast(encoded.keys, "benevolence") or []
        for tokens, mask, weight in zip(seen[1], encoded.mask[:, 1:] > 0, weights, strict=False):
            sums.add(tokens[mask], weight > 0)
    weight, bias = sums.discriminant()
    edits = gated.modules[name]
    assert edits.gate_weight is not None
    torch.testing.assert_close(edits.gate_weight[0], weight.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(architecture: str, training: bool) -> None:
    model = tiny_reader(architecture, **({"resid_pdrop": 0.5} if architecture == "gpt2" else {})).train(training)
    next(model.parameters()).requires_grad_(False)

    def state() -> Any:
        return (
            {name: module.training for name, module in model.named_modules()},
            {name: (one.requires_grad, one.grad is None) for name, one in model.named_parameters()},
            [len(module._forward_pre_hooks) for module in model.modules()],
        )

    before, weights = state(), copy.deepcopy(model.state_dict())
    neuron_map = random_map(model)
    gated = trained(neuron_map, model)
    assert state() == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    # Dropout does not blur what is learned.
    assert gated.modules == trained(neuron_map, tiny_reader(architecture)).modules


def test_the_model_is_left_as_it_was_when_the_pass_breaks_off() -> None:
    def stop(items: Any, what: str) -> Iterator[Any]:
        yield items[0]
        raise KeyboardInterrupt

    model = tiny_reader().train()
    with pytest.raises(KeyboardInterrupt):
        trained(random_map(model), model, progress=stop)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_progress_tells_how_many_scenarios_there_are() -> None:
    told: list[tuple[str, int]] = []

    def progress(items: Any, what: str) -> Any:
        told.append((what, len(items)))
        return items

    trained(random_map(tiny_reader()), progress=progress)
    assert told == [("gates", len(SCENARIOS))]


# What is refused


def test_values_without_both_classes_are_refused_before_the_pass() -> None:
    def refuse(items: Any, what: str) -> Any:
        raise AssertionError(what)

    neuron_map = random_map(tiny_reader(), values=["power", "hedonism"])
    with pytest.raises(NeVAError, match=r"No scenario contrasts hedonism with another reply.*cut the map down"):
        trained(neuron_map, progress=refuse)
    with pytest.raises(NeVAError, match=r"No scenario contrasts power, hedonism with"):
        trained(neuron_map, scenarios=[], progress=refuse)


def test_models_that_the_map_does_not_fit_are_refused() -> None:
    neuron_map = random_map(tiny_reader())
    with pytest.raises(NeVAError, match="made for another model"):
        trained(neuron_map, tiny_reader("gpt2"))
    with pytest.raises(NeVAError, match="made for another model"):
        trained(NeuronMap(replace(neuron_map.config, base=None), neuron_map.modules), tiny_reader("gpt2"))
    wide = random_map(tiny_reader(intermediate_size=128), neurons=128, base={})
    with pytest.raises(
        NeVAError, match=r"edits neuron 127 of 'model.layers.0.mlp.down_proj', which the model does not"
    ):
        trained(wide, tiny_reader())
    base = tiny_reader()
    neuron_map.apply_to(base)
    with pytest.raises(NeVAError, match=r"a neuron map loaded: train gates on its base model"):
        trained(neuron_map, base)


def test_replies_of_a_token_and_probabilities_out_of_bounds_are_refused() -> None:
    with pytest.raises(NeVAError, match="`gate_probability` must be between 0.5"):
        trained(random_map(tiny_reader()), probability=0.3)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(NeVAError, match="is a single token"):
        train_gates(
            tiny_reader(),
            tokenizer,
            random_map(tiny_reader(), ["power"]),
            [Scenario("?", {"power": "y", "face": "no"})],
        )
