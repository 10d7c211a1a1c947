"""Margins and damage are what a slow computation, reply by reply and token by token, gives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import reference
import torch
from tiny import (
    ARCHITECTURES,
    HIDDEN,
    SCENARIOS,
    TEXTS,
    TOKENS,
    VALUES,
    random_map,
    tiny_model,
    tiny_reader,
    tiny_tokenizer,
)

from neva_hf import NeVAError, NeVAModel, Scenario, load_scenarios
from neva_hf.measure import (
    Damage,
    contrast,
    damage,
    encode,
    margins,
    reply_log_probs,
    scenario_log_probs,
)

STRENGTHS = {"benevolence": 1.5, "power": -1.0}
TEN = list(load_scenarios(limit=1)[0].replies)

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def reader_with_map(architecture: str = "llama", **options: Any) -> NeVAModel:
    base = tiny_reader(architecture)
    return random_map(base, **options).apply_to(base)


def assert_near(got: dict[str, float], wanted: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert list(got) == list(wanted)
    for key, value in wanted.items():
        assert got[key] == pytest.approx(float(value), abs=tolerance), key


# Log-probabilities of replies


@each_architecture
@torch.no_grad()
def test_log_probs_equal_a_computation_without_cache_and_padding(architecture: str) -> None:
    model, tokenizer = tiny_reader(architecture), tiny_tokenizer()
    for scenario, got in zip(SCENARIOS, scenario_log_probs(model, tokenizer, SCENARIOS), strict=True):
        assert_near(got, reference.log_probs(model, tokenizer, scenario))
        assert len({round(value, 4) for value in got.values()}) == len(got)


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3"])
@torch.no_grad()
def test_a_sliding_window_shorter_than_the_prompt_changes_nothing_of_that(architecture: str) -> None:
    model, tokenizer = tiny_reader(architecture, sliding_window=8), tiny_tokenizer()
    for scenario, got in zip(SCENARIOS, scenario_log_probs(model, tokenizer, SCENARIOS), strict=True):
        assert len(tokenizer(scenario.question).input_ids) + 8 < encode(tokenizer, scenario).prompt.shape[1]
        assert_near(got, reference.log_probs(model, tokenizer, scenario))


@torch.no_grad()
def test_a_system_prompt_comes_before_the_question() -> None:
    model, tokenizer = tiny_reader(), tiny_tokenizer()
    (got,) = scenario_log_probs(model, tokenizer, SCENARIOS[:1], system="Be brief.")
    assert_near(got, reference.log_probs(model, tokenizer, SCENARIOS[0], system="Be brief."))
    assert got != scenario_log_probs(model, tokenizer, SCENARIOS[:1])[0]


@torch.no_grad()
def test_a_reply_of_one_token_is_told_by_the_prompt_alone() -> None:
    model, tokenizer = tiny_reader(), tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    one = Scenario("What now?", {"power": "a", "security": "b"})
    mixed = Scenario("What now?", {"power": "a", "security": "bcd"})
    for scenario in (one, mixed):
        assert encode(tokenizer, scenario).mask[0].sum() == 1
        (got,) = scenario_log_probs(model, tokenizer, [scenario])
        assert_near(got, reference.log_probs(model, tokenizer, scenario))


@torch.no_grad()
def test_log_probs_are_those_of_the_strengths_in_force() -> None:
    plain, model, tokenizer = tiny_reader(), reader_with_map(), tiny_tokenizer()
    neuron_map = random_map(plain)

    def found() -> list[dict[str, float]]:
        return scenario_log_probs(model, tokenizer, SCENARIOS)

    base = found()
    with model.strengths(STRENGTHS):
        inside = found()
    model.set_strengths(STRENGTHS)
    until_changed = found()
    model.set_strengths({})
    for number, scenario in enumerate(SCENARIOS):
        assert_near(base[number], reference.log_probs(plain, tokenizer, scenario))
        with reference.edited(plain, (neuron_map, STRENGTHS)):
            wanted = reference.log_probs(plain, tokenizer, scenario)
        assert_near(inside[number], wanted)
        assert inside[number] != pytest.approx(base[number], abs=1e-3)
    assert [list(row.values()) for row in until_changed] == [
        pytest.approx(list(row.values()), abs=1e-6) for row in inside
    ]
    assert found() == base


def test_gradients_flow_into_the_replies_and_into_the_prompt_only_when_asked() -> None:
    model, tokenizer = tiny_reader(), tiny_tokenizer()
    encoded = encode(tokenizer, SCENARIOS[0])
    embeddings = model.get_input_embeddings().weight
    only_in_prompt = sorted(set(encoded.prompt[0].tolist()) - set(encoded.replies.flatten().tolist()))
    assert only_in_prompt
    for prefix_grad in (False, True):
        log_probs = reply_log_probs(model, encoded, prefix_grad=prefix_grad)
        (gradient,) = torch.autograd.grad(log_probs.sum(), embeddings)
        assert float(gradient[encoded.replies[0, 0]].abs().max()) > 0
        assert (float(gradient[only_in_prompt].abs().max()) > 0) == prefix_grad
    assert not reply_log_probs(model.requires_grad_(False), encoded).requires_grad


def test_an_encoded_scenario_is_padded_on_the_right_and_masked() -> None:
    tokenizer = tiny_tokenizer()
    encoded = encode(tokenizer, SCENARIOS[0])
    assert encoded.keys == ["power", "security", "benevolence"]
    assert encoded.tokens == encoded.prompt.numel() + encoded.replies.numel()
    for row, mask, reply in zip(encoded.replies, encoded.mask, SCENARIOS[0].replies.values(), strict=True):
        count = int(mask.sum())
        assert mask.tolist() == [1.0] * count + [0.0] * (len(mask) - count)
        assert tokenizer.decode(row[:count]) == f" {reply}"


def test_a_text_without_a_token_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] | replace('?', '') }}"
    with pytest.raises(NeVAError, match="Scenario 'empty' has a text without a token"):
        encode(tokenizer, Scenario("?", {"power": "a", "security": "b"}, id="empty"))


# Margins


def test_a_margin_is_a_replys_log_prob_minus_the_mean_of_the_others() -> None:
    rows = [{"power": -1.0, "security": -2.0, "tradition": -4.0}, {"power": -3.0, "tradition": -5.0}]
    assert margins(rows, "power") == [-1 - (-2 - 4) / 2, -3 - -5]
    assert margins(rows, "security") == [-2 - (-1 - 4) / 2]
    assert margins(rows, "hedonism") == []


def test_the_margins_of_all_values_of_a_scenario_sum_to_zero() -> None:
    row = {value: math.sin(number) for number, value in enumerate(TEN)}
    assert sum(margins([row], value)[0] for value in TEN) == pytest.approx(0, abs=1e-12)


def test_a_value_that_is_left_out_is_not_among_the_others() -> None:
    rows = [{"power": -1.0, "security": -2.0, "tradition": -4.0}, {"power": -3.0, "tradition": -5.0}]
    assert contrast(list(rows[0]), "power", leave_out=["tradition"]) == [1, -1, 0]
    assert margins(rows, "power", leave_out=["tradition"]) == [-1 - -2]
    assert margins(rows, "power", leave_out=["power"]) == margins(rows, "power")


def test_the_weights_of_a_contrast_sum_to_zero_and_follow_the_order_of_the_keys() -> None:
    for keys in (TEN, TEN[::-1]):
        weights = contrast(keys, "benevolence")
        assert weights is not None
        assert weights[keys.index("benevolence")] == 1
        assert sorted(weights)[:-1] == [-1 / 9] * 9
        assert sum(weights) == pytest.approx(0, abs=1e-12)


def test_a_single_trait_is_held_against_the_reply_that_opposes_it() -> None:
    keys = ["extraversion", "-extraversion", "openness"]
    assert contrast(keys, "extraversion") == [1, -1, 0]
    assert contrast(keys, "extraversion", leave_out=["openness"]) == [1, -1, 0]
    assert contrast(keys, "openness") == [-0.5, -0.5, 1]
    assert contrast(keys, "openness", leave_out=["extraversion"]) is None


@pytest.mark.parametrize(
    ("keys", "value"), [(["power", "security"], "hedonism"), (["-power", "security"], "power"), (["power"], "power")]
)
def test_a_scenario_that_says_nothing_about_a_value_has_no_contrast(keys: list[str], value: str) -> None:
    assert contrast(keys, value) is None
    assert margins([dict.fromkeys(keys, -1.0)], value) == []


# Damage


def slow_damage(base: Any, edited: Any, tokenizer: Any, texts: list[str], max_tokens: int) -> tuple[float, float, int]:
    """KL divergence, perplexity ratio and tokens, in float64 and token by token."""
    kl, surprise, tokens = 0.0, [0.0, 0.0], 0
    for text in texts:
        ids = tokenizer(text).input_ids[:max_tokens]
        p, q = (model(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1) for model in (base, edited))
        for place, told in enumerate(ids[1:]):
            kl += sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p[place], q[place], strict=True))
            surprise[0] -= math.log(p[place, told])
            surprise[1] -= math.log(q[place, told])
            tokens += 1
    return kl / tokens, math.exp(surprise[1] / tokens) / math.exp(surprise[0] / tokens), tokens


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "falcon"])
@torch.no_grad()
def test_damage_equals_a_computation_token_by_token(architecture: str) -> None:
    tokenizer, plain = tiny_tokenizer(), tiny_reader(architecture)
    settings = [STRENGTHS, {}, {"security": 0.5}]
    found = damage(reader_with_map(architecture), tokenizer, TEXTS, settings, max_tokens=20)
    for got, strengths in zip(found, settings, strict=True):
        edited = reader_with_map(architecture)
        edited.set_strengths(strengths)
        kl, ratio, tokens = slow_damage(plain, edited, tokenizer, TEXTS, max_tokens=20)
        assert got.kl == pytest.approx(kl, rel=1e-3, abs=1e-6)
        assert got.perplexity_ratio == pytest.approx(ratio, rel=1e-4)
        assert got.tokens == tokens == sum(min(len(tokenizer(text).input_ids), 20) - 1 for text in TEXTS)
    assert found[0].kl > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_no_strength_does_exactly_no_damage(dtype: torch.dtype) -> None:
    model = reader_with_map().to(dtype)
    settings = [{}, {"power": 1.0}, {"power": 0.0, "security": 0}]
    found = damage(model, tiny_tokenizer(), TEXTS, settings)
    assert found[0] == found[2] == Damage(kl=0.0, perplexity_ratio=1.0, tokens=found[0].tokens)
    assert found[1].kl > 0


def test_damage_is_that_of_the_settings_and_not_of_what_is_in_force() -> None:
    model, tokenizer = reader_with_map(), tiny_tokenizer()
    wanted = damage(model, tokenizer, TEXTS, [STRENGTHS])
    model.set_strengths(security=3.0)
    assert damage(model, tokenizer, TEXTS, [STRENGTHS]) == wanted
    with model.strengths(security=-3.0):
        assert damage(model, tokenizer, TEXTS, [STRENGTHS]) == wanted
    assert model.get_strengths() == {"benevolence": 0, "power": 0, "security": 3}


def test_damage_of_several_settings_is_that_of_each_alone() -> None:
    model, tokenizer = reader_with_map(), tiny_tokenizer()
    settings = [{value: strength} for value in VALUES for strength in (-1.0, 2.0)]
    together = damage(model, tokenizer, TEXTS, settings)
    for got, setting in zip(together, settings, strict=True):
        (alone,) = damage(model, tokenizer, TEXTS, [setting])
        assert got.kl == pytest.approx(alone.kl, rel=1e-4)
        assert got.perplexity_ratio == pytest.approx(alone.perplexity_ratio, rel=1e-5)


def test_damage_without_bounds_is_infinite_and_raises_nothing() -> None:
    model, tokenizer = reader_with_map(), tiny_tokenizer()
    head = model.get_output_embeddings()
    head.weight.data *= 1e6
    found = damage(model, tokenizer, TEXTS, [{value: strength} for value in VALUES for strength in (-1e3, 1e3)])
    assert {one.perplexity_ratio for one in found} == {0.0, math.inf}
    assert all(one.kl > 100 for one in found)


def test_texts_without_two_tokens_are_left_out_and_alone_refused() -> None:
    model, tokenizer = reader_with_map(), tiny_tokenizer()
    assert damage(model, tokenizer, [*TEXTS, "a", ""], [STRENGTHS]) == damage(model, tokenizer, TEXTS, [STRENGTHS])
    with pytest.raises(NeVAError, match="fewer than two tokens"):
        damage(model, tokenizer, ["a", ""], [STRENGTHS])


def test_damage_of_a_model_without_a_map_is_refused() -> None:
    with pytest.raises(NeVAError, match="no NeVA layers"):
        damage(tiny_reader(), tiny_tokenizer(), TEXTS, [{}])


def test_progress_sees_every_scenario_and_every_text() -> None:
    seen: list[tuple[str, int]] = []

    def progress(items: Any, what: str) -> Any:
        seen.append((what, len(items)))
        return items

    model, tokenizer = reader_with_map(), tiny_tokenizer()
    scenario_log_probs(model, tokenizer, SCENARIOS, progress=progress)
    damage(model, tokenizer, TEXTS, [{}], progress=progress)
    assert seen == [("replies", len(SCENARIOS)), ("neutral text", len(TEXTS))]


def test_the_tiny_readers_read_all_that_the_tokenizer_writes() -> None:
    # Otherwise the tests above would compare less than they say.
    assert tiny_reader().get_input_embeddings().weight.shape == (len(TOKENS), HIDDEN)
    assert tiny_model().get_input_embeddings().weight.shape[0] < len(TOKENS)
