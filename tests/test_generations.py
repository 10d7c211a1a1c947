"""Generated answers under dials, what is broken in them, and perplexity on windows of text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_map, tiny_reader, tiny_tokenizer

from neva_hf import NeVAModel
from neva_hf.baselines.from_model import from_model
from neva_hf.baselines.method import Method
from neva_hf.errors import NeVAError
from neva_hf.evaluation.generations import Answer, Sampling, generate_answers
from neva_hf.evaluation.text_damage import (
    collapse,
    distinct,
    is_refusal,
    repeated_ngrams,
    text_damage,
    words_of,
)
from neva_hf.evaluation.wikitext import wikitext_perplexity, wikitext_windows
from neva_hf.measure import damage
from neva_hf.prompts import format_prompt

QUESTIONS = ["What now?", "Why?", "Where to go?", "Who is it?"]
SHORT = Sampling(max_new_tokens=8)
DIALS = [{}, {"power": 1.0}, {"security": -1.0}]


@pytest.fixture(scope="module")
def pair() -> tuple[NeVAModel, Any]:
    base = tiny_reader(seed=3)
    return random_map(base, size=1.0).apply_to(base), tiny_tokenizer()


def answers(pair: tuple[NeVAModel, Any], settings: Any = DIALS, questions: Any = QUESTIONS, **more: Any) -> Any:
    return generate_answers(*pair, questions, settings, from_model(pair[0]), **{"sampling": SHORT, **more})


def test_rows_of_a_batch_have_dials_of_their_own(pair: tuple[NeVAModel, Any]) -> None:
    together = answers(pair)
    for dials, made in zip(DIALS, together, strict=True):
        assert made == answers(pair, [dials])[0]
        assert [one.question for one in made] == QUESTIONS
    assert together[0] != together[1]


def test_greedy_answers_are_those_of_the_models_own_generate(pair: tuple[NeVAModel, Any]) -> None:
    model, tokenizer = pair
    (made,) = answers(pair, [{"power": 1.0}])
    for one in made:
        ids = tokenizer(format_prompt(tokenizer, one.question), return_tensors="pt", add_special_tokens=False)
        with model.strengths({"power": 1.0}):
            output = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
        assert output[: len(one.tokens)] == one.tokens


def test_without_dials_the_base_model_answers_whatever_is_set(pair: tuple[NeVAModel, Any]) -> None:
    model, _ = pair
    before = generate_answers(*pair, QUESTIONS, [{}], sampling=SHORT)
    model.set_strengths(power=2.0)
    try:
        assert generate_answers(*pair, QUESTIONS, [{}], sampling=SHORT) == before == answers(pair, [{}])
    finally:
        model.set_strengths({})


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_sampled_answers_do_not_depend_on_what_shares_their_batch(pair: tuple[NeVAModel, Any], rows: int) -> None:
    sampling = Sampling(max_new_tokens=8, temperature=0.8, seed=5)
    assert answers(pair, sampling=sampling, rows=rows) == answers(pair, sampling=sampling)


def test_another_seed_samples_other_answers(pair: tuple[NeVAModel, Any]) -> None:
    first, again, other = (
        answers(pair, sampling=Sampling(max_new_tokens=8, temperature=1.0, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_settings_share_their_luck(pair: tuple[NeVAModel, Any]) -> None:
    sampling = Sampling(max_new_tokens=8, temperature=1.0)
    one, two = answers(pair, [{}, {}], sampling=sampling)
    assert one == two


def test_samples_follow_the_models_probabilities(pair: tuple[NeVAModel, Any]) -> None:
    model, tokenizer = pair
    ids = tokenizer(format_prompt(tokenizer, "Why?"), return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        expected = model(input_ids=ids).logits[0, -1].float().softmax(-1)
    sampling = Sampling(max_new_tokens=1, temperature=1.0, top_p=1.0)
    (made,) = answers(pair, [{}], ["Why?"] * 600, sampling=sampling, rows=200)
    # (an answer that ends at once has no token)
    seen = torch.bincount(torch.tensor([*(one.tokens or [0] for one in made)])[:, 0], minlength=len(expected)) / 600
    ends = {model.generation_config.eos_token_id, tokenizer.eos_token_id} - {None}
    told = torch.tensor([0.0 if token in ends else 1.0 for token in range(len(expected))])
    told[0] = 0.0
    # Three standard errors of the likeliest token's share, at most.
    assert float(((seen - expected) * told).abs().max()) < 0.06


def test_a_small_nucleus_is_greedy(pair: tuple[NeVAModel, Any]) -> None:
    nucleus = Sampling(max_new_tokens=8, temperature=1.0, top_p=1e-6)
    assert answers(pair, sampling=nucleus) == answers(pair)


def test_methods_that_work_by_the_prompt_are_asked_for_it(pair: tuple[NeVAModel, Any]) -> None:
    model, tokenizer = pair
    prompted = Method("p", ["power"], from_model(model).at, lambda dials: "Be bold." if dials else None)
    silent = Method("q", ["power"], lambda rows: from_model(model).at([{}]), prompted.system)
    said = generate_answers(model, tokenizer, QUESTIONS, [{}, {"power": 1.0}], silent, sampling=SHORT)
    told = Sampling(max_new_tokens=8, system="Be bold.")
    assert said[0] == answers(pair, [{}])[0]
    bold = generate_answers(model, tokenizer, QUESTIONS, [{}], sampling=told)[0]
    assert [one.text for one in said[1]] == [one.text for one in bold]


def test_an_answer_ends_before_the_next_question(pair: tuple[NeVAModel, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = pair
    spoken = tokenizer("Go.\nQuestion: What", add_special_tokens=False)["input_ids"]

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat([input_ids, torch.tensor([spoken] * len(input_ids))], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    (made,) = generate_answers(model, tokenizer, ["Why?"], [{}], sampling=SHORT)
    assert (made[0].text, made[0].ended) == ("Go.", True)


def test_dials_without_a_method_are_refused(pair: tuple[NeVAModel, Any]) -> None:
    with pytest.raises(NeVAError, match="need a method"):
        generate_answers(*pair, QUESTIONS, [{"power": 1.0}])
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"temperature": math.nan}):
        with pytest.raises(NeVAError, match="max_new_tokens"):
            Sampling(**wrong)  # type: ignore[arg-type]


def test_repeated_ngrams_are_counted_within_an_answer() -> None:
    assert repeated_ngrams(["a", "b", "c", "d", "e", "f"]) == 0.0
    assert repeated_ngrams(["a"] * 10) == pytest.approx(1 - 1 / 7)
    assert repeated_ngrams(["a", "b", "c", "d", "a", "b", "c", "d"]) == pytest.approx(1 / 5)
    assert repeated_ngrams(["a", "b", "c"]) == 0.0


def test_a_loop_is_found_where_it_begins() -> None:
    start = ["it", "is", "good", "to", "go", "on"]
    assert collapse(start) is None
    assert collapse([*start, *["a", "b", "c"] * 5]) == len(start)
    # A loop that is cut off in the middle.
    assert collapse([*start, *["a", "b", "c"] * 5, "a"]) == len(start)
    assert collapse(["a"] * 12) == 0
    # Too short, or not often enough.
    assert collapse([*start, *["a"] * 11]) is None
    assert collapse([*start, *["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"] * 2]) is None
    # What ends otherwise is no loop.
    assert collapse([*["a", "b"] * 10, "and", "so", "it", "ends"]) is None


def test_variety_is_counted_over_all_answers() -> None:
    assert distinct([["a", "b"], ["a", "b"]], 1) == 0.5
    assert distinct([["a", "b"], ["b", "a"]], 2) == 1.0
    assert math.isnan(distinct([["a"]], 2))


def test_refusals_are_told_by_how_they_begin() -> None:
    for text in (
        "I'm sorry, but I can't help.",
        "I’m so sorry.",
        "I cannot do that.",
        "As an AI, I",
        " Sorry, I can't.",
    ):
        assert is_refusal(text), text
    for text in ("I can help.", "It is a sorry sight.", "You could say: I cannot come.", ""):
        assert not is_refusal(text), text


def test_damage_of_text_is_the_mean_over_answers() -> None:
    made = [
        Answer("?", {}, "So we go on and " + "on " * 20, [], False),
        Answer("?", {}, "I cannot help.", [], True),
        Answer("?", {}, "...", [], True),
        Answer("?", {}, "Help a friend, don't wait.", [], True),
    ]
    found = text_damage(made)
    assert found.answers == 4
    assert (found.collapsed, found.refused, found.empty, found.ended) == (0.25, 0.25, 0.25, 0.75)
    assert found.words == (25 + 3 + 0 + 5) / 4
    assert words_of(made[3].text) == ["help", "a", "friend", "don't", "wait"]
    assert math.isnan(text_damage([]).words)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "test.txt"
    path.write_text("The rock is dark, and water boils at a hundred. " * 8)
    return path


def test_windows_do_not_overlap(pair: tuple[NeVAModel, Any], text: Path) -> None:
    tokenizer = pair[1]
    windows = wikitext_windows(tokenizer, text, windows=3, window=20)
    whole = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    assert [token for window in windows for token in window] == whole[:60]
    with_start = wikitext_windows(tiny_tokenizer(bos_token="<|end|>"), text, windows=1, window=20)
    assert with_start == [whole[:20]]
    with pytest.raises(NeVAError, match="fewer than one window"):
        wikitext_windows(tokenizer, text, window=5000)
    with pytest.raises(NeVAError, match="cannot be read"):
        wikitext_windows(tokenizer, text.with_name("nowhere.txt"))


def test_perplexity_and_divergence_are_those_of_measure(pair: tuple[NeVAModel, Any], text: Path) -> None:
    model, tokenizer = pair
    (window,) = wikitext_windows(tokenizer, text, windows=1, window=40)
    dials = [{"power": 1.0}, {}, {"security": -1.0}]
    found = wikitext_perplexity(model, tokenizer, [window], from_model(model), dials)
    expected = damage(model, tokenizer, [text.read_text()], dials, max_tokens=40)
    for one, other in zip(found, expected, strict=True):
        assert one.kl == pytest.approx(other.kl, abs=1e-6)
        assert one.ratio == pytest.approx(other.perplexity_ratio, rel=1e-5)
        assert one.tokens == other.tokens == 39
        assert one.perplexity == pytest.approx(one.base * one.ratio, rel=1e-6)
    assert (found[1].kl, found[1].ratio) == (0.0, 1.0)
    with torch.inference_mode():
        loss = model(input_ids=torch.tensor([window]), labels=torch.tensor([window])).loss
    assert found[0].base == pytest.approx(math.exp(loss), rel=1e-5)


def test_a_system_prompt_costs_what_it_changes_and_its_tokens_do_not_count(
    pair: tuple[NeVAModel, Any], text: Path
) -> None:
    model, tokenizer = pair
    windows = wikitext_windows(tokenizer, text, windows=2, window=20)
    prompted = Method(
        "p", ["power"], lambda rows: from_model(model).at([{}]), lambda dials: "Be bold." if dials else None
    )
    none, bold = wikitext_perplexity(model, tokenizer, windows, prompted, [{}, {"power": 1.0}])
    assert none.kl == 0.0
    assert bold.kl > 0
    assert none.tokens == bold.tokens == 38
    with pytest.raises(NeVAError, match="no window"):
        wikitext_perplexity(model, tokenizer, [], prompted, [{}])
