"""Calibration and damage: strength +1 and -1 cost what was asked for, measured as for maps; and peers' own vectors."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from steered import MANY, SCALABLE, evidence, hooks_of
from tiny import TEXTS, VALUES, random_map, tiny_reader, tiny_tokenizer

from neva_hf import NeVAError, NeVAModel
from neva_hf.baselines import METHODS, Evidence, Method, calibrated, damage_of, from_model
from neva_hf.baselines.damage import _behind
from neva_hf.baselines.repe import directions
from neva_hf.measure import damage
from neva_hf.prompts import format_prompt, format_reply

TARGET = 0.01


@pytest.fixture(scope="module")
def shared() -> Evidence:
    return evidence()


def slow_damage(base: torch.Tensor, steered: torch.Tensor, told: list[int]) -> tuple[float, float]:
    """Summed KL divergence and loss difference over the told tokens, `[tokens, vocabulary]` each."""
    one, other = base.double().log_softmax(-1), steered.double().log_softmax(-1)
    kl = float((one.exp() * (one - other)).sum())
    return kl, sum(float(one[at, token] - other[at, token]) for at, token in enumerate(told))


# Damage


def test_damage_is_the_mean_divergence_from_the_base_model(shared: Evidence) -> None:
    method, settings = METHODS["CAA"](shared), [{"power": 1.0}, {}, {"security": -2.0}]
    found = damage_of(method, shared.model, shared.tokenizer, TEXTS, settings)
    for number, setting in enumerate(settings):
        total, loss, tokens = 0.0, 0.0, 0
        for text in TEXTS:
            ids = shared.tokenizer(text)["input_ids"]
            with torch.no_grad():
                base = shared.model(input_ids=torch.tensor([ids])).logits[0, :-1]
                with method.at([setting]):
                    steered = shared.model(input_ids=torch.tensor([ids])).logits[0, :-1]
            kl, worse = slow_damage(base, steered, ids[1:])
            total, loss, tokens = total + kl, loss + worse, tokens + len(ids) - 1
        assert found[number].kl == pytest.approx(total / tokens, rel=1e-3, abs=1e-6)
        assert found[number].perplexity_ratio == pytest.approx(math.exp(loss / tokens), rel=1e-3)
        assert found[number].tokens == tokens
    assert found[1].kl < 1e-9


def test_damage_of_a_map_is_what_measure_says() -> None:
    model = tiny_reader()
    mapped = NeVAModel.from_map(model, random_map(model))
    settings = [{"power": 1.0}, {"security": -1.0}]
    wanted = damage(mapped, tiny_tokenizer(), TEXTS, settings, max_tokens=12)
    mapped.set_strengths(benevolence=3.0)
    found = damage_of(from_model(mapped), mapped, tiny_tokenizer(), TEXTS, settings, max_tokens=12)
    for one, other in zip(found, wanted, strict=True):
        assert one.kl == pytest.approx(other.kl, rel=1e-4)
        assert one.perplexity_ratio == pytest.approx(other.perplexity_ratio, rel=1e-4)
        assert one.tokens == other.tokens
    assert mapped.get_strengths()["benevolence"] == 3.0


def test_damage_of_a_system_prompt_compares_the_texts_own_tokens(shared: Evidence) -> None:
    method = METHODS["System prompt"](shared)
    found = damage_of(method, shared.model, shared.tokenizer, TEXTS[:1], [{"power": 1.0}, {}])
    ids = shared.tokenizer(TEXTS[0])["input_ids"]
    front = shared.tokenizer("You have a high level of power.\n\n")["input_ids"]
    with torch.no_grad():
        base = shared.model(input_ids=torch.tensor([ids])).logits[0, :-1]
        steered = shared.model(input_ids=torch.tensor([front + ids])).logits[0, len(front) : -1]
    kl, worse = slow_damage(base, steered, ids[1:])
    assert found[0].kl == pytest.approx(kl / (len(ids) - 1), rel=1e-4)
    assert found[0].perplexity_ratio == pytest.approx(math.exp(worse / (len(ids) - 1)), rel=1e-4)
    assert found[1].kl < 1e-9


def test_a_beginning_of_text_token_stays_the_first() -> None:
    tokenizer = tiny_tokenizer(bos_token="<|end|>")
    text = tokenizer("hi")["input_ids"]
    assert _behind(tokenizer, "ab", [0, *text]) == [0, *tokenizer("ab\n\n")["input_ids"], *text]
    assert _behind(tokenizer, "ab", text) == [*tokenizer("ab\n\n")["input_ids"], *text]
    assert _behind(tokenizer, None, text) == text


def test_texts_without_two_tokens_are_refused(shared: Evidence) -> None:
    with pytest.raises(NeVAError, match="fewer than two tokens"):
        damage_of(METHODS["Random neurons"](shared), shared.model, shared.tokenizer, ["a", ""], [{"power": 1.0}])


# Calibration


@pytest.mark.parametrize("name", SCALABLE)
def test_calibration_reaches_the_wanted_divergence_for_every_value_and_sign(shared: Evidence, name: str) -> None:
    method = calibrated(METHODS[name](shared), shared.model, shared.tokenizer, TEXTS, target_kl=TARGET)
    ends = [{value: sign} for value in VALUES for sign in (-1.0, 1.0)]
    found = damage_of(method, shared.model, shared.tokenizer, TEXTS, ends)
    kl = [pair for value in VALUES for pair in method.notes["kl"][value]]  # type: ignore[index]
    assert [one.kl for one in found] == pytest.approx(kl, rel=1e-3)
    missed = method.notes.get("not_reached", [])
    assert isinstance(missed, list)
    near = [0.9 * TARGET <= one.kl <= 1.1 * TARGET for one in found]
    assert len(missed) == near.count(False)
    assert not missed
    assert hooks_of(shared.model) == 0


def test_strengths_between_are_parts_of_the_unit(shared: Evidence) -> None:
    plain = METHODS["CAA"](shared)
    method = calibrated(plain, shared.model, shared.tokenizer, TEXTS, target_kl=TARGET)
    low, high = method.notes["units"]["power"]  # type: ignore[index]
    rows, own = [{"power": 0.5}, {"power": -2.0}], [{"power": 0.5 * high}, {"power": -2 * low}]
    found = damage_of(method, shared.model, shared.tokenizer, TEXTS, rows)
    assert found == damage_of(plain, shared.model, shared.tokenizer, TEXTS, own)


def test_the_notes_of_the_method_are_kept_and_the_given_one_is_left_alone(shared: Evidence) -> None:
    plain = METHODS["CAA"](shared)
    method = calibrated(plain, shared.model, shared.tokenizer, TEXTS, target_kl=TARGET)
    assert method.notes["layer"] == plain.notes["layer"]
    assert "units" not in plain.notes
    assert method.notes["target_kl"] == TARGET


def test_a_prompt_is_measured_and_not_scaled(shared: Evidence) -> None:
    plain = METHODS["System prompt"](shared)
    method = calibrated(plain, shared.model, shared.tokenizer, TEXTS, target_kl=TARGET)
    wanted = damage_of(plain, shared.model, shared.tokenizer, TEXTS, [{"power": -1.0}, {"power": 1.0}])
    assert method.notes["kl"]["power"] == pytest.approx([one.kl for one in wanted])  # type: ignore[index]
    assert method.system({"power": 1.0}) == plain.system({"power": 1.0})
    assert any("power +" in one for one in method.notes["not_reached"])  # type: ignore[attr-defined]


def bent(shared: Evidence, bend: Any) -> Method:
    """CAA whose strengths are bent before they are used."""
    caa = METHODS["CAA"](shared)

    @contextmanager
    def at(rows: Any) -> Any:
        with caa.at([{name: bend(strength) for name, strength in row.items()} for row in rows]):
            yield

    return Method("bent", caa.values, at)


def test_a_method_that_saturates_says_so(shared: Evidence) -> None:
    method = bent(shared, lambda strength: 1e-3 * math.tanh(strength))
    found = calibrated(method, shared.model, shared.tokenizer, TEXTS, target_kl=TARGET)
    missed = found.notes["not_reached"]
    assert isinstance(missed, list)
    assert len(missed) == 2 * len(VALUES)
    assert missed[0].startswith("benevolence -: the nearest to 0.01 is")


def test_a_method_that_cannot_do_less_says_so(shared: Evidence) -> None:
    method = bent(shared, lambda strength: math.copysign(1e4, strength) if strength else 0.0)
    found = calibrated(method, shared.model, shared.tokenizer, TEXTS, target_kl=TARGET)
    assert len(found.notes["not_reached"]) == 2 * len(VALUES)  # type: ignore[arg-type]


def test_a_method_that_does_nothing_says_so(shared: Evidence) -> None:
    found = calibrated(bent(shared, lambda strength: 0.0), shared.model, shared.tokenizer, TEXTS, target_kl=TARGET)
    assert len(found.notes["not_reached"]) == 2 * len(VALUES)  # type: ignore[arg-type]


@pytest.mark.parametrize("power", [0.4, 3.0])
def test_calibration_does_not_need_the_square_law(shared: Evidence, power: float) -> None:
    method = bent(shared, lambda strength: math.copysign(abs(strength) ** power, strength))
    found = calibrated(method, shared.model, shared.tokenizer, TEXTS, target_kl=TARGET)
    assert "not_reached" not in found.notes


def test_one_sign_alone_serves_both(shared: Evidence) -> None:
    found = calibrated(METHODS["CAA"](shared), shared.model, shared.tokenizer, TEXTS, target_kl=TARGET, signs=(1,))
    low, high = found.notes["units"]["power"]  # type: ignore[index]
    assert low == high


@pytest.mark.parametrize("target", [0.0, -1.0, 7.0])
def test_a_divergence_that_cannot_be_asked_for_is_refused(shared: Evidence, target: float) -> None:
    with pytest.raises(NeVAError, match="target_kl"):
        calibrated(METHODS["Random neurons"](shared), shared.model, shared.tokenizer, TEXTS, target_kl=target)


# Peers' own packages


def pairs_of(value: str) -> list[tuple[str, str]]:
    """Every reply of a value with each that competes with it, as whole texts."""
    tokenizer, found = tiny_tokenizer(), []
    for scenario in MANY:
        prompt = format_prompt(tokenizer, scenario.question)
        texts = {key: prompt + format_reply(tokenizer, reply) for key, reply in scenario.replies.items()}
        if value in texts:
            found += [(texts[value], text) for key, text in texts.items() if key != value]
    return found


def test_caa_gives_the_vector_of_steering_vectors(shared: Evidence) -> None:
    package = pytest.importorskip("steering_vectors")
    # Pairs weigh alike there, scenarios here: the same where each has as many replies.
    train = [scenario for scenario in MANY if len(scenario.replies) == 3]
    ours = evidence(shared.model, train=train).readings.last_stream()
    tokenizer = tiny_tokenizer(pad_token="<|end|>")
    for row, value in enumerate(VALUES):
        pairs = [pair for pair in pairs_of(value) if not pair[0].startswith(format_prompt(tokenizer, "Why?"))]
        theirs = package.train_steering_vector(shared.model, tokenizer, pairs)
        for layer, vector in theirs.layer_activations.items():
            torch.testing.assert_close(ours[row, layer], vector, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("centring", ["pca_center", "pca_diff"])
def test_repe_gives_the_vector_of_repeng(shared: Evidence, centring: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its annotations name a type that numpy 2 dropped.
    monkeypatch.setattr(np, "float_", np.float64, raising=False)
    package = pytest.importorskip("repeng")
    tokenizer = tiny_tokenizer(pad_token="<|end|>", padding_side="right")
    ours = directions(shared.readings, [0], centring)
    for row, value in enumerate(VALUES):
        dataset = [package.DatasetEntry(own, rival) for own, rival in pairs_of(value)]
        theirs = package.ControlVector.train(
            shared.model, tokenizer, dataset, method=centring, hidden_layers=[0], batch_size=1
        )
        torch.testing.assert_close(ours[row, 0], torch.from_numpy(theirs.directions[0]), atol=1e-3, rtol=1e-3)
