"""Identification: the sums of the pass are what slow computations give, planted neurons are found, units are true."""

from __future__ import annotations

import copy
import importlib
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import mean
from typing import Any

import peft
import pytest
import reference
import torch
from tiny import (
    ARCHITECTURES,
    D_FF,
    LAYERS,
    SCENARIOS,
    TEXTS,
    VALUES,
    random_map,
    tiny_mixture,
    tiny_reader,
    tiny_tokenizer,
)
from transformers import PreTrainedModel

from neva_hf import NeuronMap, NeVAConfig, NeVAError, NeVAModel, Scenario, identify_neurons, load_value_system
from neva_hf.architectures import describe_base, find_down_projections
from neva_hf.identify import (
    SCORES,
    Scored,
    Statistics,
    attribution,
    build_map,
    calibrate,
    collect,
    expected,
    middle_layers,
    top_neurons,
)
from neva_hf.identify.calibrate import FLUENT_KL, MAX_STRENGTH
from neva_hf.identify.lengths import length_groups, only
from neva_hf.measure import EncodedScenario, contrast, damage, margins, scenario_log_probs
from neva_hf.prompts import format_prompt, format_reply

SHAPE = (len(VALUES), LAYERS, D_FF)

# (the package has a function of that name)
COLLECT = importlib.import_module("neva_hf.identify.collect")
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
some_architectures = pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])


def identify(model: PreTrainedModel | None = None, **options: Any) -> NeuronMap:
    """The whole identification on tiny things; neurons by their scores unless asked otherwise."""
    options = {"scenarios": SCENARIOS, "neurons": 8, "neutral_texts": TEXTS, "leakage_penalty": 0.0, **options}
    return identify_neurons(model or tiny_reader(), tiny_tokenizer(), **options)


def slow_margin(model: PreTrainedModel, scenario: Scenario, value: str) -> float:
    log_probs = {key: float(found) for key, found in reference.log_probs(model, tiny_tokenizer(), scenario).items()}
    (margin,) = margins([log_probs], value)
    return margin


def token_counts(scenario: Scenario, key: str) -> tuple[int, int]:
    tokenizer = tiny_tokenizer()
    texts = format_prompt(tokenizer, scenario.question), format_reply(tokenizer, scenario.replies[key])
    prompt, reply = (len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts)
    return prompt, reply


@contextmanager
def edited(
    model: PreTrainedModel, module: torch.nn.Module, neuron: int, kind: str, by: float, prompt: int
) -> Iterator[None]:
    """A neuron shifted by a constant, or by so much of itself, at all tokens behind the prompt, in a batch of one."""

    def hook(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x = args[0].clone()
        own = x.reshape(-1, x.shape[-1])[prompt:, neuron]
        own += by * own if kind == "gain" else by
        return (x, *args[1:])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """What goes into each down projection, `[tokens, d_ff]` of a batch of one, in the order of the blocks."""
    seen: list[torch.Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1]).double()))
        for module in find_down_projections(model).values()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def slow_activations(model: PreTrainedModel, scenario: Scenario) -> dict[str, torch.Tensor]:
    """Per reply the activations at those of its tokens that tell another one, `[L, tokens, N]`."""
    found = {}
    for key, reply in scenario.replies.items():
        only, (prompt, count) = Scenario(scenario.question, {key: reply, "other": "-"}), token_counts(scenario, key)
        with watched(model) as seen:
            reference.log_probs(model, tiny_tokenizer(), only)
        found[key] = torch.stack([x[prompt : prompt + count - 1] for x in seen[: len(seen) // 2]])
    return found


# The pass over scenarios


# Llama's norms compute in float32 whatever the model's dtype is, and OPT's ReLUs have kinks.
@pytest.mark.parametrize("kind", ["shift", "gain"])
@pytest.mark.parametrize(
    ("architecture", "step", "near"), [("llama", 1e-2, 1e-2), ("gpt2", 1e-4, 1e-5), ("opt", 1e-5, 1e-5)]
)
def test_the_gradient_is_that_of_a_real_edit_of_one_neuron_on_the_replies(
    architecture: str, step: float, near: float, kind: str
) -> None:
    model = tiny_reader(architecture).double()
    modules = find_down_projections(model)
    statistics = collect(model, tiny_tokenizer(), SCENARIOS, VALUES, gains=kind == "gain")
    assert statistics.gradient.shape == SHAPE
    generator = torch.Generator().manual_seed(0)
    for row, value in enumerate(VALUES):
        told = [scenario for scenario in SCENARIOS if value in scenario.replies]
        assert statistics.count[row] == len(told)
        for layer, module in enumerate(modules.values()):
            for neuron in torch.randint(D_FF, (3,), generator=generator).tolist():
                slopes = []
                for scenario in told:
                    prompt, _ = token_counts(scenario, value)
                    with torch.no_grad():
                        ends = []
                        for by in (-step, step):
                            with edited(model, module, neuron, kind, by, prompt):
                                ends.append(slow_margin(model, scenario, value))
                    slopes.append((ends[1] - ends[0]) / (2 * step))
                got = float(statistics.mean_gradients()[row, -1, layer, neuron])
                assert got == pytest.approx(mean(slopes), rel=near, abs=near * 3e-4)
                assert kind == "gain" or abs(got) > 1e-6


@each_architecture
@torch.no_grad()
def test_the_difference_is_that_of_mean_activations_between_replies(architecture: str) -> None:
    model = tiny_reader(architecture)
    statistics = collect(model, tiny_tokenizer(), SCENARIOS, VALUES)
    seen = [slow_activations(model, scenario) for scenario in SCENARIOS]
    for row, value in enumerate(VALUES):
        found = []
        for activations in seen:
            if value in activations:
                others = [x.mean(1) for key, x in activations.items() if key != value]
                found.append(activations[value].mean(1) - sum(others) / len(others))
        wanted = sum(found) / len(found)
        torch.testing.assert_close(statistics.mean_difference()[row].double(), wanted, atol=1e-5, rtol=1e-4)
        assert statistics.count[row] == len(found)


@some_architectures
@torch.no_grad()
def test_the_variance_is_that_of_all_tokens_of_the_replies(architecture: str) -> None:
    model = tiny_reader(architecture)
    statistics = collect(model, tiny_tokenizer(), SCENARIOS, VALUES)
    tokens = torch.cat([x for one in SCENARIOS for x in slow_activations(model, one).values()], dim=1)
    assert statistics.tokens == tokens.shape[1]
    torch.testing.assert_close(statistics.mean / statistics.tokens, tokens.mean(1), atol=1e-6, rtol=1e-5)
    wanted = tokens.var(1, correction=0)
    torch.testing.assert_close(statistics.variance().double(), wanted, atol=1e-6, rtol=1e-3)


@torch.no_grad()
def test_half_precision_activations_are_summed_in_full_precision() -> None:
    model = tiny_reader().bfloat16()
    long = [Scenario("Why?", {"power": "I want it " * 20, "security": "it is safe " * 20})]
    seen: list[torch.Tensor] = []
    module = find_down_projections(model)["model.layers.1.mlp.down_proj"]
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    statistics = collect(model, tiny_tokenizer(), long, ["power", "security"])
    handle.remove()
    _prompts, replies = seen
    counts = [token_counts(long[0], key)[1] - 1 for key in long[0].replies]
    rows = [row[:count] for row, count in zip(replies, counts, strict=True)]
    difference = rows[0].mean(0) - rows[1].mean(0)
    torch.testing.assert_close(statistics.difference[0, 1], difference, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(statistics.mean[1], torch.cat(rows).sum(0), atol=1e-4, rtol=1e-6)


def test_the_sums_of_two_halves_add_up_to_those_of_the_whole() -> None:
    model, tokenizer = tiny_reader(), tiny_tokenizer()
    whole = collect(model, tokenizer, SCENARIOS, VALUES)
    added = Statistics.zeros(VALUES, list(find_down_projections(model)), D_FF)
    for half in (SCENARIOS[:1], SCENARIOS[1:]):
        added.add(collect(model, tokenizer, half, VALUES))
    for name in ("gradient", "difference", "count", "mean", "square"):
        torch.testing.assert_close(getattr(added, name), getattr(whole, name), atol=1e-12, rtol=1e-12)
        assert getattr(added, name).dtype == torch.float64
    assert added.tokens == whole.tokens


@each_architecture
def test_replies_in_groups_of_like_length_give_the_sums_of_all_together(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_reader(architecture).double()
    found = []
    for worth in (1, 10**6):
        monkeypatch.setattr(COLLECT, "worth_of_a_pass", lambda device, worth=worth: worth)
        found.append(collect(model, tiny_tokenizer(), SCENARIOS, VALUES, probes=True).tensors())
    cut, together = found
    for name, tensor in together.items():
        torch.testing.assert_close(cut[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_replies_are_cut_where_it_saves_most_and_only_if_that_is_enough() -> None:
    lengths = [9, 3, 8, 2, 3]
    mask = torch.tensor([[1.0] * length + [0.0] * (9 - length) for length in lengths])
    encoded = EncodedScenario(torch.ones(1, 4).long(), mask.long(), mask, list("abcde"))
    # Three replies of at most 3 tokens beside one of 9: 3 * 6 tokens less.
    assert length_groups(encoded, 18) == [[1, 3, 4], [0, 2]]
    assert length_groups(encoded, 19) == [[0, 1, 2, 3, 4]]
    short = only(encoded, [1, 3, 4])
    assert short.keys == ["b", "d", "e"]
    assert short.replies.shape == (3, 3)
    assert short.mask.sum(1).tolist() == [3, 2, 3]
    assert length_groups(only(encoded, [1, 4]), 1) == [[0, 1]]
    assert length_groups(only(encoded, [0]), 0) == [[0]]


def test_statistics_of_other_values_or_models_are_not_added() -> None:
    one = Statistics.zeros(["power", "security"], ["a"], 4)
    for other in (
        Statistics.zeros(["security", "power"], ["a"], 4),
        Statistics.zeros(["power", "security"], ["b"], 4),
    ):
        with pytest.raises(NeVAError, match="the same values in the same model"):
            one.add(other)


def test_no_scenario_gives_means_of_zero() -> None:
    nothing = Statistics.zeros(["power"], ["a", "b"], 4)
    for found in (nothing.mean_gradient(), nothing.mean_difference(), nothing.variance()[None]):
        assert torch.equal(found, torch.zeros(1, 2, 4))


def test_values_that_are_not_asked_for_take_part_as_what_is_held_against() -> None:
    model, tokenizer = tiny_reader(), tiny_tokenizer()
    every, one = (collect(model, tokenizer, SCENARIOS, values) for values in (VALUES, ["security"]))
    row = VALUES.index("security")
    assert torch.equal(one.gradient[0], every.gradient[row])
    assert torch.equal(one.difference[0], every.difference[row])


def state_of(model: torch.nn.Module) -> dict[str, Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "hooks": {name: [len(getattr(one, hook)) for hook in hooks] for name, one in model.named_modules()},
        "trained": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "gradients": [name for name, parameter in model.named_parameters() if parameter.grad is not None],
        "training": {name: module.training for name, module in model.named_modules()},
        "attributes": sorted(vars(model)),
        "config": model.config.to_dict(),
    }


@some_architectures
@pytest.mark.parametrize("call", ["collect", "identify"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluating", "training"])
def test_the_model_is_left_as_it_was(architecture: str, call: str, training: bool) -> None:
    model = tiny_reader(architecture).train(training)
    next(model.parameters()).requires_grad_(False)
    before, weights = state_of(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    ids = torch.arange(3, 20)[None]

    def logits() -> torch.Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            return model(input_ids=ids).logits

    said = logits()
    if call == "collect":
        collect(model, tiny_tokenizer(), SCENARIOS, VALUES)
    else:
        identify(model)
    assert state_of(model) == before
    assert torch.equal(logits(), said)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())


def test_the_model_is_left_as_it_was_when_the_pass_breaks_off() -> None:
    model = tiny_reader()
    before = state_of(model)

    def stop(items: Sequence[Any], what: str) -> Iterator[Any]:
        yield items[0]
        raise KeyboardInterrupt

    for options in (
        {"progress": stop},
        {"progress": lambda items, what: stop(items, what) if "neu" in what else items},
    ):
        with pytest.raises(KeyboardInterrupt):
            identify(model, **options)
        assert state_of(model) == before


def test_dropout_of_a_model_in_training_does_not_blur_what_is_found() -> None:
    wanted = collect(tiny_reader("gpt2"), tiny_tokenizer(), SCENARIOS, VALUES)
    got = collect(tiny_reader("gpt2", resid_pdrop=0.5).train(), tiny_tokenizer(), SCENARIOS, VALUES)
    assert torch.equal(got.gradient, wanted.gradient)
    assert torch.equal(got.difference, wanted.difference)


def test_a_pass_works_inside_no_grad_and_leaves_the_setting() -> None:
    with torch.no_grad():
        inside = collect(tiny_reader(), tiny_tokenizer(), SCENARIOS, VALUES)
        assert not torch.is_grad_enabled()
    assert torch.equal(inside.gradient, collect(tiny_reader(), tiny_tokenizer(), SCENARIOS, VALUES).gradient)


def test_a_reply_of_one_token_is_refused_before_it_spoils_the_sums() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    scenario = Scenario("Go on?", {"power": "y", "security": "no"})
    with pytest.raises(NeVAError, match=r"reply to 'Go on\?' is a single token.*a sentence or two"):
        collect(tiny_reader(), tokenizer, [scenario], ["power"])


# Scores and selection


def statistics_of(gradient: torch.Tensor, difference: torch.Tensor, count: float = 1.0) -> Statistics:
    values, layers, neurons = gradient.shape
    found = Statistics.zeros([f"v{row}" for row in range(values)], [f"m{row}" for row in range(layers)], neurons)
    found.gradient, found.difference = gradient.double(), difference.double()
    found.count += count
    return found


def test_attribution_is_derivative_times_difference_shifted_along_the_difference() -> None:
    gradient, difference = torch.tensor([[[2.0, -4.0, 0.0, 6.0]]]), torch.tensor([[[3.0, -1.0, 5.0, -2.0]]])
    scored = attribution(statistics_of(gradient, difference, count=2))
    assert scored.score.tolist() == [[[1.5, 1.0, 0.0, -3.0]]]
    assert scored.shift.tolist() == [[[1.5, -0.5, 2.5, -1.0]]]
    assert SCORES["attribution"] is attribution


@pytest.mark.parametrize(
    ("layers", "first", "last"), [(1, 0, 0), (2, 0, 1), (3, 1, 2), (10, 2, 8), (12, 2, 10), (30, 6, 27), (80, 16, 75)]
)
def test_the_middle_layers_are_those_from_a_fifth_to_nineteen_twentieths_of_the_depth(
    layers: int, first: int, last: int
) -> None:
    assert middle_layers(layers) == list(range(first, last + 1))


def test_top_neurons_are_the_highest_of_the_open_layers() -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(3, 4, 50, generator=generator)
    chosen = top_neurons(score, 12, [1, 3])
    assert chosen.dtype == torch.bool
    assert chosen.shape == score.shape
    for row in range(3):
        wanted = score[row, [1, 3]].flatten().sort(descending=True).values[:12]
        assert torch.equal(score[row][chosen[row]].sort(descending=True).values, wanted)
        assert not chosen[row, [0, 2]].any()


def test_only_neurons_with_a_positive_score_are_chosen() -> None:
    score = torch.tensor([[[3.0, 0.0, -1.0, 1.0]]])
    assert top_neurons(score, 3, [0]).tolist() == [[[True, False, False, True]]]


def test_selection_refuses_what_there_is_not() -> None:
    score = torch.ones(2, 3, 4)
    for layers in ([], [3], [-1], [0, 7]):
        with pytest.raises(NeVAError, match=r"`layers` must be numbers from 0 to 2, got"):
            top_neurons(score, 1, layers)
    for neurons in (0, 9, -1):
        with pytest.raises(NeVAError, match=f"`neurons` must be 1 to 8 for these layers, got {neurons}"):
            top_neurons(score, neurons, [0, 2, 2])
    with pytest.raises(NeVAError, match="No neuron has a positive score for one of the values"):
        top_neurons(torch.stack([score[0], -score[0]]), 2, [0])


def test_a_map_holds_the_chosen_neurons_and_their_shifts_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    score, shift = (torch.randn(2, 3, 20, generator=generator) for _ in range(2))
    chosen = top_neurons(score, 7, [0, 2])
    neuron_map = build_map(shift, chosen, ["a", "b", "c"], NeVAConfig(values=["power", "security"]))
    assert set(neuron_map.modules) <= {"a", "c"}
    for row, value in enumerate(neuron_map.values):
        laid_out = torch.zeros(3, 20)
        for name, edits in neuron_map.modules.items():
            laid_out["abc".index(name), edits.index.long()] = edits.shift[row]
        assert torch.equal(laid_out, torch.where(chosen[row], shift[row], 0.0))
        counts = neuron_map.neuron_counts()[value]
        assert sum(counts.values()) == 7
        assert counts == {name: int(chosen[row, "abc".index(name)].sum()) for name in counts}


# Planted neurons

PLANTED = {"power": ("a", [3, 17]), "security": ("b", [5, 40]), "benevolence": ("c", [21, 60])}
PLANTED_SCENARIOS = [
    Scenario(question, {value: sign * 6 for value, (sign, _) in PLANTED.items()}) for question in ("x?", "y?", "z?")
]


def planted_llama() -> PreTrainedModel:
    """A model in whose last layer two neurons per value fire on its letter and write towards its letter."""
    model = tiny_reader("llama")
    tokenizer, block = tiny_tokenizer(), model.model.layers[-1]
    with torch.no_grad():
        for parameter in (block.self_attn.o_proj.weight, model.model.layers[0].self_attn.o_proj.weight):
            parameter.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        for sign, neurons in PLANTED.values():
            (token,) = tokenizer(sign).input_ids
            read, written = (
                torch.nn.functional.normalize(matrix.weight[token], dim=0)
                for matrix in (model.get_input_embeddings(), model.get_output_embeddings())
            )
            for neuron in neurons:
                block.mlp.gate_proj.weight[neuron] = read
                block.mlp.up_proj.weight[neuron] = read
                block.mlp.down_proj.weight[:, neuron] = 2 * written
    return model


def test_planted_neurons_come_out_on_top_and_raise_the_margin_of_their_value() -> None:
    model, tokenizer = planted_llama(), tiny_tokenizer()
    neuron_map = identify(model, scenarios=PLANTED_SCENARIOS, neurons=2)
    last = list(find_down_projections(model))[-1]
    for value, (_, neurons) in PLANTED.items():
        assert {name: index.tolist() for name, index in neuron_map.neurons(value).items()} == {last: neurons}
        assert float(neuron_map.select([value]).modules[last].shift.min()) > 0
    edited = neuron_map.apply_to(model)
    shifts = {}
    for strength in (-1.0, 0.0, 1.0, 2.0):
        for target in PLANTED:
            with edited.strengths({target: strength}):
                log_probs = scenario_log_probs(edited, tokenizer, PLANTED_SCENARIOS)
            shifts[target, strength] = mean(margins(log_probs, target))
    for target in PLANTED:
        rising = [shifts[target, strength] for strength in (-1.0, 0.0, 1.0, 2.0)]
        assert rising == sorted(rising)
        assert rising[2] - rising[1] > 0.02


def test_dialling_a_found_value_moves_the_margin_its_way_on_random_models_too() -> None:
    for architecture in ("llama", "gpt2", "opt", "gemma3"):
        base, tokenizer = tiny_reader(architecture), tiny_tokenizer()
        edited = identify(base).apply_to(base)
        for value in VALUES:
            found = {}
            for strength in (-1.0, 0.0, 1.0):
                with edited.strengths({value: strength}):
                    found[strength] = mean(margins(scenario_log_probs(edited, tokenizer, SCENARIOS), value))
            assert found[-1.0] < found[0.0] < found[1.0], (architecture, value)


def test_a_score_of_the_callers_own_decides() -> None:
    def third(statistics: Statistics) -> Scored:
        score = torch.zeros(statistics.gradient.shape)
        score[:, 1, 3] = 1.0
        return Scored(score, torch.full_like(score, 0.5))

    neuron_map = identify(score=third, neurons=4)
    assert neuron_map.config.provenance["score"] == "third"
    assert all(
        {name: index.tolist() for name, index in neuron_map.neurons(value).items()}
        == {"model.layers.1.mlp.down_proj": [3]}
        for value in VALUES
    )


def test_only_the_layers_that_are_asked_for_are_edited() -> None:
    neuron_map = identify(layers=[1], neurons=5)
    assert list(neuron_map.modules) == ["model.layers.1.mlp.down_proj"]
    assert all(sum(counts.values()) == 5 for counts in neuron_map.neuron_counts().values())


# Single traits

TRAITS = [
    Scenario("Tonight?", {"extraversion": "to the party", "-extraversion": "a quiet book"}),
    Scenario("Sunday?", {"extraversion": "call them all", "-extraversion": "sleep alone", "openness": "try it"}),
]


def test_a_single_trait_is_found_against_the_reply_that_opposes_it() -> None:
    model, tokenizer = tiny_reader(), tiny_tokenizer()
    statistics = collect(model, tokenizer, TRAITS, ["extraversion"])
    pairs = [Scenario(one.question, {key: one.replies[key] for key in list(one.replies)[:2]}) for one in TRAITS]
    wanted = collect(model, tokenizer, pairs, ["extraversion"])
    torch.testing.assert_close(statistics.gradient, wanted.gradient, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(statistics.difference, wanted.difference, atol=1e-6, rtol=1e-4)
    neuron_map = identify(model, scenarios=TRAITS)
    assert neuron_map.values == ["extraversion", "openness"]
    assert neuron_map.config.provenance["scenarios"] == 2


def test_swapping_a_trait_and_its_opposite_turns_every_sum_around() -> None:
    model, tokenizer = tiny_reader(), tiny_tokenizer()
    replies = [(one.replies["extraversion"], one.replies["-extraversion"]) for one in TRAITS]
    swapped = [
        Scenario(one.question, {"extraversion": minus, "-extraversion": plus})
        for one, (plus, minus) in zip(TRAITS, replies, strict=True)
    ]
    there, back = (collect(model, tokenizer, scenarios, ["extraversion"]) for scenarios in (TRAITS, swapped))
    torch.testing.assert_close(back.difference, -there.difference, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(back.gradient, -there.gradient, atol=1e-5, rtol=1e-4)


# Calibration


def slow_kl(base: PreTrainedModel, edited: NeVAModel, texts: Sequence[str]) -> float:
    """D(base || edited) in nats per token, in float64, one text after the other."""
    kl, tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor([tiny_tokenizer()(text).input_ids])
        with torch.no_grad():
            p, q = (model(input_ids=ids).logits[0, :-1].double().log_softmax(-1) for model in (base, edited))
        kl += float((p.exp() * (p - q)).sum())
        tokens += len(p)
    return kl / tokens


@pytest.mark.parametrize("target_kl", [0.02, 0.05, 0.3])
@some_architectures
def test_strengths_one_and_minus_one_cost_the_target_for_every_value(architecture: str, target_kl: float) -> None:
    base = tiny_reader(architecture)
    neuron_map = identify(target_kl=target_kl, model=tiny_reader(architecture))
    edited = neuron_map.apply_to(tiny_reader(architecture))
    for value in VALUES:
        for strength in (-1.0, 1.0):
            edited.set_strengths({value: strength})
            kl = slow_kl(base, edited, TEXTS)
            assert kl == pytest.approx(target_kl, rel=0.08)
            measured = neuron_map.config.measurements["calibration"][value][f"{strength:+.0f}"]
            assert measured["kl"] == pytest.approx(kl, rel=1e-3)
    assert neuron_map.config.provenance["target_kl"] == target_kl


def test_what_is_measured_belongs_to_the_units_that_are_written_when_the_rounds_run_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = tiny_reader()
    edited = random_map(base, size=0.3).apply_to(base)
    module = sys.modules["neva_hf.identify.calibrate"]
    monkeypatch.setattr(module, "_ROUGH", (1, 1, 0.0))
    monkeypatch.setattr(module, "_FINE", (10**6, 1, 0.0))
    found = calibrate(edited, tiny_tokenizer(), TEXTS)
    for value in VALUES:
        for strength in (-1.0, 1.0):
            edited.set_strengths({value: strength})
            assert found.measured[value][f"{strength:+.0f}"]["kl"] == pytest.approx(
                slow_kl(tiny_reader(), edited, TEXTS), rel=1e-3
            )


@pytest.mark.parametrize("target_kl", [0.05, 0.1])
def test_ranges_hold_the_unit_and_end_where_the_text_stops_being_fluent(target_kl: float) -> None:
    base = tiny_reader()
    edited = identify(base, target_kl=target_kl).apply_to(base)
    ranges = edited.peft_config["default"].ranges
    assert set(ranges) == set(VALUES)
    for value, (low, high) in ranges.items():
        assert -MAX_STRENGTH <= low <= -1 < 0 < 1 <= high <= MAX_STRENGTH
        costs = damage(edited, tiny_tokenizer(), TEXTS[:3], [{value: low}, {value: high}])
        for end, cost in zip((low, high), costs, strict=True):
            assert cost.kl <= FLUENT_KL * 1.25
            assert cost.kl >= FLUENT_KL * 0.6 or abs(end) == MAX_STRENGTH


def test_strengths_outside_the_range_are_warned_about_and_inside_are_not(recwarn: pytest.WarningsRecorder) -> None:
    base = tiny_reader()
    edited = identify(base).apply_to(base)
    low, high = edited.peft_config["default"].ranges["power"]
    recwarn.clear()
    for inside in (low, 0.0, high):
        edited.set_strengths(power=inside)
    assert len(recwarn) == 0
    for outside in (low - 0.1, high + 0.1):
        with pytest.warns(UserWarning, match="outside the range"):
            edited.set_strengths(power=outside)


def test_calibration_is_in_force_when_it_returns() -> None:
    base = tiny_reader()
    edited = random_map(base, size=0.3).apply_to(base)
    edited.set_strengths(power=1.0)
    found = calibrate(edited, tiny_tokenizer(), TEXTS)
    assert edited.peft_config["default"].units == found.units
    assert edited.peft_config["default"].ranges == found.ranges
    assert edited.get_strengths() == {"benevolence": 0, "power": 1, "security": 0}
    assert slow_kl(tiny_reader(), edited, TEXTS) == pytest.approx(0.05, rel=0.08)


def test_calibration_does_not_depend_on_how_large_shifts_are_written() -> None:
    found = []
    for size in (0.05, 5.0):
        base = tiny_reader()
        found.append(calibrate(random_map(base, size=size).apply_to(base), tiny_tokenizer(), TEXTS).units)
    for value in VALUES:
        assert [a / b for a, b in zip(found[0][value], found[1][value], strict=True)] == pytest.approx(
            [100, 100], rel=0.08
        )


def test_a_map_is_not_changed_by_being_calibrated_on_a_copy() -> None:
    base = tiny_reader()
    neuron_map = random_map(base, size=0.3, units={"power": [2.0, 3.0]}, ranges={"power": [-4.0, 4.0]})
    before = copy.deepcopy(neuron_map)
    calibrate(neuron_map.apply_to(base), tiny_tokenizer(), TEXTS)
    assert neuron_map.config.to_dict() == before.config.to_dict()
    assert all(torch.equal(edits.shift, before.modules[name].shift) for name, edits in neuron_map.modules.items())


@pytest.mark.parametrize("target_kl", [0, -0.1, 5, math.nan, math.inf])
def test_a_target_that_is_no_divergence_is_refused_before_the_search(target_kl: float) -> None:
    base = tiny_reader()
    with pytest.raises(NeVAError, match="`target_kl` must be between 0 and 5 nats per token"):
        calibrate(random_map(base).apply_to(base), tiny_tokenizer(), TEXTS, target_kl=target_kl)


def test_an_edit_that_changes_nothing_is_refused() -> None:
    base = tiny_reader()
    with torch.no_grad():
        for module in find_down_projections(base).values():
            module.weight.zero_()
    with pytest.raises(NeVAError, match="edit of 'benevolence' changes nothing of what the model says"):
        calibrate(random_map(base).apply_to(base), tiny_tokenizer(), TEXTS)


def test_a_divergence_that_no_strength_reaches_is_refused() -> None:
    base = tiny_reader()
    # With a norm behind the last block, an edit can do no more than replace what is said.
    with torch.no_grad():
        base.get_output_embeddings().weight.mul_(0.01)
    with pytest.raises(NeVAError, match=r"No strength of '.*' was found that costs 4 nats per token"):
        calibrate(random_map(base).apply_to(base), tiny_tokenizer(), TEXTS, target_kl=4.0)


# The map that comes out


def test_the_same_inputs_give_the_same_map_bit_for_bit() -> None:
    one, other = (identify() for _ in range(2))
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in one.state_dict().items())
    configs = [one.config.to_dict(), other.config.to_dict()]
    for config in configs:
        assert config["measurements"].pop("seconds") >= 0
    assert configs[0] == configs[1]


def test_a_map_says_where_it_comes_from(tmp_path: Any) -> None:
    model = tiny_reader()
    model.name_or_path = "someone/tiny"
    system = load_value_system("schwartz10")
    found = identify(model, value_system=system)
    found.save_pretrained(tmp_path)
    read = NeuronMap.from_pretrained(tmp_path)
    assert read.base_model == "someone/tiny"
    assert read.values == ["power", "security", "benevolence"]
    assert read.config.value_system == system.to_dict()
    assert read.config.base == describe_base(model)
    assert read.config.base["name"] == "someone/tiny"
    assert read.config.base["fingerprint"]["weights"]
    told = read.config.provenance
    assert (told["method"], told["score"], told["neurons"]) == ("neva", "attribution", 8)
    assert (told["layers"], told["scenarios"], told["neutral_texts"]) == ([0, 1], len(SCENARIOS), len(TEXTS))
    assert told["versions"]["peft"] == peft.__version__
    assert read.config.to_dict() == found.config.to_dict() | {"inference_mode": True}
    assert all(torch.equal(tensor, read.state_dict()[key]) for key, tensor in found.state_dict().items())


@each_architecture
def test_every_architecture_gives_a_map_that_loads_on_it(architecture: str, tmp_path: Any) -> None:
    identify(tiny_reader(architecture), values=["power", "benevolence"]).save_pretrained(tmp_path)
    model = NeVAModel.from_pretrained(tiny_reader(architecture), tmp_path)
    encoded_before = damage(model, tiny_tokenizer(), TEXTS, [{"power": 1.0}, {"benevolence": -1.0}])
    assert [one.kl for one in encoded_before] == pytest.approx([0.05, 0.05], rel=0.08)


# What is refused


def test_a_value_without_scenarios_is_refused_before_the_pass() -> None:
    def refuse(items: Any, what: str) -> Any:
        raise AssertionError(what)

    with pytest.raises(NeVAError, match="No scenario contrasts hedonism, face with another reply"):
        identify(values=["power", "hedonism", "face"], progress=refuse)
    lonely = [Scenario("Why?", {"-power": "no", "security": "it is safe"})]
    with pytest.raises(NeVAError, match="No scenario contrasts power with"):
        identify(scenarios=lonely, progress=refuse)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"score": "magic"}, r"no score 'magic': choose one of \['attribution'.*\], or pass a function"),
        ({"neurons": LAYERS * D_FF + 1}, f"`neurons` must be 1 to {LAYERS * D_FF} for these layers, got 129"),
        ({"neurons": 0}, "`neurons` must be 1 to"),
        ({"layers": [0, 2]}, r"`layers` must be numbers from 0 to 1, got \[0, 2\]"),
        ({"layers": []}, "`layers` must be numbers from 0 to 1"),
        ({"values": "power"}, "`values` must be a list of names"),
        ({"values": []}, "`values` must hold 1 to 256 names"),
        ({"values": ["power", "power"]}, "Each value may stand once"),
        ({"values": ["Power"]}, "cannot be the name of a value"),
        ({"scenarios": []}, "`values` must hold 1 to 256 names"),
        ({"neutral_texts": []}, "fewer than two tokens"),
        ({"target_kl": 0}, "`target_kl` must be between 0 and 5"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(NeVAError, match=says):
        identify(**options)


def test_a_model_with_a_neuron_map_on_it_is_refused() -> None:
    base = tiny_reader()
    edited = random_map(base).apply_to(base)
    for model in (edited, base):
        with pytest.raises(NeVAError, match=r"a neuron map loaded already.*model.unload\(\)"):
            identify(model)
    assert identify(edited.unload()).values == ["power", "security", "benevolence"]


def test_a_model_with_other_adapters_is_refused() -> None:
    lora = peft.get_peft_model(tiny_reader(), peft.LoraConfig(target_modules=["q_proj"], r=1))
    for model in (lora, lora.get_base_model()):
        with pytest.raises(NeVAError, match=r"has adapters: merge them.*merge_and_unload"):
            identify(model)
    assert identify(lora.merge_and_unload()).values == ["power", "security", "benevolence"]


def test_a_mixture_of_experts_is_refused() -> None:
    with pytest.raises(NeVAError, match=r"'model.layers.0.mlp.experts' is a mixture of experts"):
        identify(tiny_mixture())


def test_progress_tells_every_part() -> None:
    told: list[tuple[str, int]] = []

    def progress(items: Any, what: str) -> Any:
        told.append((what, len(items)))
        return items

    identify(progress=progress)
    assert told[0] == ("scenarios", len(SCENARIOS))
    assert {what for what, _ in told[1:]} == {"neutral text"}


def test_the_other_passes_tell_their_progress_too() -> None:
    told: list[str] = []

    def progress(items: Any, what: str) -> Any:
        told.append(what)
        return items

    identify(leakage_penalty=1.0, gains=True, dose_scenarios=SCENARIOS[:1], gates=True, progress=progress)
    assert list(dict.fromkeys(told)) == [
        "scenarios",
        "sensitivity",
        "replies",
        "selection",
        "neutral text",
        "dose curves",
        "gates",
    ]


def test_gains_are_found_from_enough_scenarios_on_or_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    balanced = {"leakage_penalty": 1.0, "samples": 64}
    few, asked = identify(**balanced), identify(**balanced, gains=True)
    assert not few.config.use_gain
    assert not few.config.provenance["gains"]
    assert asked.config.use_gain
    assert any(bool((edits.gain != 0).any()) for edits in asked.modules.values() if edits.gain is not None)
    monkeypatch.setattr("neva_hf.identify.pipeline._ENOUGH_FOR_GAINS", len(SCENARIOS))
    many, refused = identify(**balanced), identify(**balanced, gains=False)
    assert many.modules == asked.modules
    assert refused.modules == few.modules
    # Scores alone say nothing about gains.
    assert not identify(gains=True).config.use_gain


def test_a_map_carries_its_dose_curves_and_its_gates(tmp_path: Any) -> None:
    plain = identify()
    full = identify(dose_scenarios=SCENARIOS[:2], gates=True)
    full.save_pretrained(tmp_path)
    read = NeuronMap.from_pretrained(tmp_path)
    assert "dose" not in plain.config.measurements
    assert not plain.config.use_gate
    assert read.config.use_gate
    assert all(edits.gate_weight is not None for edits in read.modules.values())
    dose = read.config.measurements["dose"]
    assert dose == full.config.measurements["dose"]
    for value in read.values:
        # (strength 1 was calibrated to 0.05 on other texts)
        assert expected(dose, value, 1.0).kl == pytest.approx(0.05, rel=0.3)
        assert expected(dose, value, 0.0).margins[value] == 0.0
    # Gates and curves come after calibration: strengths mean the same with and without them.
    assert read.config.units == plain.config.units


def test_the_balanced_choice_says_so() -> None:
    assert identify(leakage_penalty=1.0, seed=3).config.provenance["score"] == "balanced"
    assert identify(leakage_penalty=1.0, seed=3).config.provenance["seed"] == 3


def test_one_scenario_gives_each_value_its_own_contrast() -> None:
    # Otherwise the finite differences above would hold for a mix-up of values as well.
    model, tokenizer = tiny_reader(), tiny_tokenizer()
    statistics = collect(model, tokenizer, SCENARIOS[:1], VALUES)
    assert torch.linalg.matrix_rank(statistics.gradient.flatten(1)) == 2
    torch.testing.assert_close(statistics.gradient.sum(0), torch.zeros(LAYERS, D_FF).double(), atol=1e-7, rtol=0)
    keys = list(SCENARIOS[0].replies)
    assert [contrast(keys, value) for value in keys] == [[1, -0.5, -0.5], [-0.5, 1, -0.5], [-0.5, -0.5, 1]]


def test_the_other_scores_are_what_they_say() -> None:
    statistics = statistics_of(torch.full(SHAPE, 2.0), torch.full(SHAPE, -3.0))
    statistics.tokens += 1
    statistics.scenarios += 1
    statistics.square += 4.0
    statistics.spread += 9.0
    statistics.activity += -0.25
    for name, score, shift in (("gradient", 4.0, 8.0), ("contrast", 1.0, -3.0), ("probability", 0.25, -3.0)):
        scored = SCORES[name](statistics)
        torch.testing.assert_close(scored.score, torch.full(SHAPE, score))
        torch.testing.assert_close(scored.shift, torch.full(SHAPE, shift))


@some_architectures
def test_spread_and_activity_are_those_of_slow_activations(architecture: str) -> None:
    model = tiny_reader(architecture)
    scenario = SCENARIOS[0]
    slow = slow_activations(model, scenario)
    statistics = collect(model, tiny_tokenizer(), [scenario], VALUES)
    means = torch.stack([slow[key].mean(1) for key in scenario.replies])
    torch.testing.assert_close(statistics.deviation(), means.std(0).float(), rtol=1e-3, atol=1e-5)
    shares = torch.stack([(slow[key] > 0).float().mean(1) for key in scenario.replies])
    value = VALUES[0]
    weights = torch.tensor(contrast(list(scenario.replies), value))
    expected = torch.einsum("r,rln->ln", weights, shares)
    torch.testing.assert_close(statistics.mean_activity()[0], expected.float())


@pytest.mark.parametrize("score", sorted(SCORES))
def test_every_score_gives_a_calibrated_map(score: str) -> None:
    found = identify(score=score)
    assert found.config.provenance["score"] == score
    assert set(found.config.units) == set(found.values)
