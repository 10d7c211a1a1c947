"""The judge that names values by words: what it knows, what it measures of itself, what it says."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import random_map, tiny_reader, tiny_tokenizer

from neva_hf import Scenario
from neva_hf.errors import NeVAError
from neva_hf.evaluation.judges import make_judge
from neva_hf.evaluation.text_features import hidden_features, sentence_features
from neva_hf.evaluation.text_judge import TOO_WEAK, Measured, TextJudge, read_valuelens
from neva_hf.evaluation.verdicts import Item

pytest.importorskip("sklearn")

WORDS = {"power": "lead win rule", "security": "safe home lock", "benevolence": "help friend care"}


def scenarios(count: int, words: dict[str, str] = WORDS) -> list[Scenario]:
    return [
        Scenario(
            f"What now, {number}?",
            {value: f"Then {own.split()[number % 3]} it." for value, own in words.items()},
        )
        for number in range(count)
    ]


def shuffled(count: int, seed: int) -> list[Scenario]:
    """Replies that say nothing about their value."""
    random = np.random.default_rng(seed)
    every = " ".join(WORDS.values()).split()
    return [Scenario("What now?", {value: " ".join(random.choice(every, 3)) for value in WORDS}) for _ in range(count)]


@pytest.fixture(scope="module")
def shipped() -> TextJudge:
    return TextJudge.from_options()


def test_an_answer_prioritizes_the_value_that_its_words_name() -> None:
    judge = TextJudge(scenarios(6), scenarios(3))
    answers = ["We win and rule.", "Lock your home.", "We win and rule.", " "]
    values = ["power", "security", "benevolence", "power"]
    found = judge([Item("?", answer, value) for answer, value in zip(answers, values, strict=True)])
    assert found.prioritized == [True, True, False, None]
    assert judge.name([]) == []


def test_its_own_accuracy_and_chance_stand_beside_every_number() -> None:
    judge = TextJudge(scenarios(6), scenarios(3))
    assert judge.measured == [Measured("unseen replies of the scenarios", 1.0, 1 / 3, 9)]
    note = judge([Item("?", "We win.", "power")]).note
    assert "100% right on unseen replies of the scenarios (9 texts, chance 33%)" in note
    assert TOO_WEAK not in note


def test_a_judge_that_learnt_nothing_says_that_it_is_too_weak() -> None:
    judge = TextJudge(shuffled(20, 0), shuffled(20, 1))
    assert not judge.trusted
    assert TOO_WEAK in judge([Item("?", "We win.", "power")]).note


def test_a_judge_is_only_trusted_if_it_is_good_on_all_that_it_was_measured_on() -> None:
    wrong = [("Lock it, safe at home.", "power"), ("Help a friend.", "security"), ("Win and lead.", "benevolence")]
    judge = TextJudge(scenarios(6), scenarios(3), labelled={"other texts": [*wrong, ("What?", "courage")]})
    assert judge.measured[0].trusted
    assert judge.measured[1] == Measured("other texts", 0.0, 1 / 3, 3)
    assert not judge.trusted


def test_the_threshold_lies_halfway_from_chance_to_perfect() -> None:
    assert Measured("x", 0.55, 0.1, 10).trusted
    assert not Measured("x", 0.549, 0.1, 10).trusted
    # Where guessing the commonest value is right more often, more is asked.
    assert not Measured("x", 0.7, 0.5, 10).trusted


def test_the_shipped_scenarios_train_a_judge_that_can_be_trusted(shipped: TextJudge) -> None:
    (found,) = shipped.measured
    assert found.chance == pytest.approx(0.1)
    assert found.texts == 360
    # Measured: 0.853.
    assert 0.8 < found.accuracy < 0.95
    assert shipped.trusted


def test_the_judge_is_the_same_every_time(shipped: TextJudge) -> None:
    texts = ["Go and see the world.", "Keep the old ways.", "Ask the others what they need."]
    assert TextJudge.from_options().name(texts) == shipped.name(texts)


def test_values_that_it_does_not_know_are_refused(shipped: TextJudge) -> None:
    with pytest.raises(NeVAError, match="courage"):
        shipped([Item("?", "Yes.", "courage")])
    with pytest.raises(NeVAError, match="two values"):
        TextJudge([], [])
    with pytest.raises(NeVAError, match="None of the others"):
        shipped.measure("others", [("Yes.", "courage")])
    with pytest.raises(NeVAError, match="no such option"):
        make_judge("text", colour="red")


def test_labelled_texts_of_valuelens_are_read(tmp_path: Path) -> None:
    path = tmp_path / "lens.csv"
    rows = [
        "A title",
        "A description",
        "model###text###values###intensity",
        "a###I choose my own way.###[Self-Direction]###[strong_support]",
        r"b###We care, all of us.###\[Benevolence\]###\[mild\_support\]",
        "c###He only wants to win.###[Power]###[strong_resistance]",
        "d###Both of them.###[Power, Security]###[mild_support, mild_support]",
        "e###It rains.###[]###[no_values]",
        "",
    ]
    path.write_text("\n".join(rows), encoding="utf-8-sig")
    assert read_valuelens(path) == [
        ("I choose my own way.", "self_direction"),
        ("We care, all of us.", "benevolence"),
    ]
    path.write_text("text,value\n")
    with pytest.raises(NeVAError, match="no rows of ValueLens"):
        read_valuelens(path)
    with pytest.raises(NeVAError, match="cannot be read"):
        read_valuelens(tmp_path / "nowhere.csv")


def test_features_of_ones_own_are_weighed_beside_words() -> None:
    def by_letter(texts: Sequence[str]) -> np.ndarray:
        return np.array([[text.count("w"), text.count("k"), text.count("f")] for text in texts], dtype=float)

    words = {"power": "wow wow wow", "security": "kk kk kk", "benevolence": "ff ff ff"}
    # Words of which the classifier by words knows nothing.
    unknown = ["www", "kkkk", "fffff"]
    judge = TextJudge(scenarios(6, words), scenarios(3, words), features=by_letter)
    assert judge.name(unknown) == ["power", "security", "benevolence"]


def test_hidden_states_are_means_over_the_texts_own_tokens() -> None:
    model, tokenizer = tiny_reader(), tiny_tokenizer()
    texts = ["Lead them.", "Help the friend who is ill.", "", "Stay"]
    found = hidden_features(model, tokenizer, depth=0.5)(texts)
    for text, row in zip(texts, found, strict=True):
        if not text:
            assert not row.any()
            continue
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states[1][0]
        assert row.tolist() == pytest.approx(states.mean(0).tolist(), abs=1e-5)
    assert hidden_features(model, tokenizer)([]).shape == (0, model.config.hidden_size)
    with pytest.raises(NeVAError, match="depth"):
        hidden_features(model, tokenizer, depth=2)


def test_a_text_is_read_with_all_dials_at_0() -> None:
    base = tiny_reader()
    model = random_map(base, size=2.0).apply_to(base)
    features = hidden_features(model, tiny_tokenizer())
    before = features(["Lead them."])
    model.set_strengths(power=3.0)
    assert (features(["Lead them."]) == before).all()


def test_a_model_comes_with_its_tokenizer_and_without_an_embedder() -> None:
    with pytest.raises(NeVAError, match="a model with its tokenizer"):
        TextJudge.from_options(model=tiny_reader())
    with pytest.raises(NeVAError, match="a model with its tokenizer"):
        TextJudge.from_options(model=tiny_reader(), tokenizer=tiny_tokenizer(), embedder="x")


def test_an_embedder_is_taken_from_sentence_transformers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Fake:
        def __init__(self, name: str) -> None:
            if not Path(name).is_dir():
                raise OSError("no such model")

        def encode(self, texts: list[str], show_progress_bar: bool) -> np.ndarray:
            return np.array([[len(text), text.count("e"), text.count("a")] for text in texts], dtype=float)

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Fake))
    assert sentence_features(tmp_path)(["A bee."]).tolist() == [[6.0, 2.0, 0.0]]
    with pytest.raises(NeVAError, match="cannot be loaded"):
        sentence_features(tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(NeVAError, match="pip install sentence-transformers"):
        TextJudge.from_options(embedder=tmp_path)
