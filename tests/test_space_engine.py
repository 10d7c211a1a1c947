"""The model of the Space: both answers from one batch, and nobody sees anybody else's dials."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from space_tools import DIALS, base_model, idle, last, saved, tiny_engine, tokenizer, twin
from tiny import VALUES, random_map, tiny_model
from transformers import LogitsProcessorList

from neva_hf import NeuronMap, NeVAError
from neva_hf.space.engine import Engine, Exchange
from neva_hf.space.limits import Limits
from neva_hf.space.rows import SharedNoise
from neva_hf.talk import AnswerOptions, answers

QUESTION = "What should I do with a free weekend?"
HISTORY = [Exchange("Hello?", "the base model's answer", "another one, and longer"), Exchange("And?", "so", "well")]


def ask(engine: Engine, dials: dict[str, float] = DIALS, **options: Any) -> Any:
    history = options.pop("history", [])
    return last(engine.stream(history, options.pop("question", QUESTION), dials, **{"max_new_tokens": 12, **options}))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_dials_change_the_edited_answer_and_not_the_base_one(temperature: float) -> None:
    engine = tiny_engine()
    turns = [ask(engine, dials, temperature=temperature) for dials in ({}, DIALS, {"security": 2.0})]
    assert len({turn.base for turn in turns}) == 1
    assert len({turn.edited for turn in turns}) == 3
    assert turns[0].edited == turns[0].base


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_greedy_answers_are_those_of_the_command_line(architecture: str, chat: bool) -> None:
    engine = tiny_engine(architecture, chat)
    base = base_model(architecture)
    wanted = answers(
        random_map(base).apply_to(base), tokenizer(chat), QUESTION, [{}, DIALS], options=AnswerOptions(12)
    )
    turn = ask(engine)
    assert [turn.base, turn.edited] == wanted
    assert wanted[0] != wanted[1]


@pytest.mark.parametrize("seed", range(6))
def test_a_row_at_strength_0_says_what_the_base_model_alone_says_with_that_seed(seed: int) -> None:
    engine, alone, reader = tiny_engine(), base_model(), tokenizer()
    prompt = reader("user: " + QUESTION + "\nassistant: ", return_tensors="pt", add_special_tokens=False)
    noise = LogitsProcessorList([SharedNoise(1.0, seed)])
    made = alone.generate(**prompt, max_new_tokens=12, do_sample=False, logits_processor=noise, pad_token_id=0)
    text = reader.decode(made[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    turn = ask(engine, seed=seed, temperature=1.0)
    assert turn.base == text


def test_seeds_matter_when_sampling_alone() -> None:
    engine = tiny_engine()
    assert len({ask(engine, seed=seed, temperature=1.0).base for seed in range(4)}) == 4
    assert len({ask(engine, seed=seed).base for seed in range(4)}) == 1


def test_sampling_draws_tokens_as_often_as_they_are_likely() -> None:
    # Within the nucleus: here the third token lies outside.
    logits = torch.log(torch.tensor([[0.6, 0.36, 0.04]]))
    noise = SharedNoise(1.0, 0)
    drawn = torch.stack([noise(None, logits)[0] for _ in range(4000)]).eq(0).float().mean(0)
    assert drawn[2] == 0
    assert drawn[0].item() == pytest.approx(0.6 / 0.96, abs=0.03)


def test_turns_grow_token_by_token_and_the_last_one_is_done() -> None:
    turns = list(tiny_engine().stream([], QUESTION, DIALS, max_new_tokens=12))
    assert [turn.done for turn in turns] == [False] * (len(turns) - 1) + [True]
    assert [turn.tokens for turn in turns] == sorted(turn.tokens for turn in turns)
    assert turns[-1].tokens == 12
    assert turns[-1].note == "Cut at 12 tokens."


def test_a_side_that_ends_waits_for_the_other() -> None:
    engine, reader = tiny_engine(), tokenizer()
    generation = engine.model.generation_config
    # Letters alone, which are a token each.
    generation.suppress_tokens = [
        id for text, id in reader.get_vocab().items() if not (len(text) == 1 and "a" <= text <= "z")
    ]
    whole = ask(engine, max_new_tokens=20)
    end = next(letter for letter in whole.base[1:] if letter not in whole.edited)
    generation.eos_token_id = reader.get_vocab()[end]
    turn = ask(engine, max_new_tokens=20)
    assert turn.edited == whole.edited
    assert turn.base == whole.base.partition(end)[0]


def test_each_side_goes_on_with_its_own_answers() -> None:
    engine = tiny_engine()
    turn = ask(engine, history=HISTORY)
    swapped = ask(engine, history=[Exchange(one.question, one.edited, one.base) for one in HISTORY])
    model = twin(engine)
    sides = [[(one.question, one.base) for one in HISTORY], [(one.question, one.edited) for one in HISTORY]]
    for side, dials, text in zip(sides, [{}, DIALS], [turn.base, turn.edited], strict=True):
        assert answers(model, tokenizer(), QUESTION, [dials], history=side, options=AnswerOptions(12)) == [text]
    assert swapped.base != turn.base
    # Lists do as well: that is what comes back from a browser.
    assert ask(engine, history=[list(one) for one in HISTORY]) == turn


def test_twenty_visitors_at_once_get_what_each_gets_alone() -> None:
    engine = tiny_engine()
    jobs: list[dict[str, Any]] = [
        {
            "dials": {VALUES[number % 3]: 0.2 * (number - 10)},
            "question": f"What now, {number}?",
            "seed": number,
            "temperature": 1.0 if number % 2 else 0.0,
            "history": HISTORY[: number % 3],
        }
        for number in range(20)
    ]
    alone = [ask(engine, **dict(job)) for job in jobs]
    assert len({turn.edited for turn in alone}) == 20
    found: dict[int, list[Any]] = {number: [] for number in range(20)}
    start = threading.Barrier(20)

    def visit(number: int) -> None:
        start.wait(timeout=60)
        for _ in range(3):
            found[number].append(ask(engine, **dict(jobs[number])))

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert found == {number: [alone[number]] * 3 for number in range(20)}
    idle(engine)


class Counted:
    """Counts the forward passes of an engine's model."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch, at: dict[int, threading.Event] | None = None):
        self.passes = 0
        forward = engine.model.get_base_model().forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.passes += 1
            if at and self.passes in at:
                assert at[self.passes].wait(timeout=60)
            return forward(*args, **kwargs)

        monkeypatch.setattr(engine.model.get_base_model(), "forward", counted)


def test_closing_the_iterator_stops_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, go_on = tiny_engine(), threading.Event()
    counted = Counted(engine, monkeypatch, {4: go_on})
    turns = engine.stream([], QUESTION, DIALS, max_new_tokens=200)
    next(turns)
    turns.close()  # type: ignore[attr-defined]
    go_on.set()
    idle(engine)
    assert 1 <= counted.passes <= 4


def test_who_leaves_the_line_is_never_served(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, go_on = tiny_engine(limits=Limits(wait_seconds=0.01)), threading.Event()
    counted = Counted(engine, monkeypatch)
    engine._shared.worker.submit(lambda: assert_set(go_on))
    with pytest.raises(NeVAError, match="The model is busy"):
        ask(engine)
    go_on.set()
    idle(engine)
    assert counted.passes == 0


def assert_set(event: threading.Event) -> None:
    assert event.wait(timeout=60)


def test_answers_end_when_their_time_is_up() -> None:
    turn = ask(tiny_engine(limits=Limits(seconds=0.0)))
    assert turn.done
    assert turn.tokens == 1
    assert turn.note == "Stopped after 0 seconds."


def test_a_line_that_is_too_long_takes_nobody_more() -> None:
    engine, go_on = tiny_engine(limits=Limits(waiting=2)), threading.Event()
    for _ in range(3):
        engine._shared.worker.submit(lambda: assert_set(go_on))
    with pytest.raises(NeVAError, match="3 people are waiting"):
        ask(engine)
    go_on.set()
    engine._shared.worker._executor.submit(lambda: None).result(timeout=60)  # type: ignore[union-attr]
    assert ask(engine).done


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no question": ({"question": " \n"}, "Type a question first"),
    "no text": ({"question": 7}, "Type a question first"),
    "a long question": ({"question": "a" * 2001}, "2001 characters, and may have 2000"),
    "many tokens": ({"question": "a" * 300}, "tokens for the model, which reads 200 here. Ask for less"),
    "a long conversation": ({"history": [("a" * 90, "b" * 90, "c")] * 2}, "Clear the conversation, or ask for less"),
    "a huge conversation": ({"history": [("a", "b" * 9000, "c")] * 5}, "too long for the model. Clear it"),
    "half a conversation": ({"history": [("a", "b")]}, "must be a list of"),
    "no conversation": ({"history": "abc"}, "must be a list of"),
    "no texts": ({"history": [("a", None, "c")]}, "must hold texts alone"),
    "another value": ({"dials": {"luck": 1.0}}, "no value 'luck'"),
    "beyond the reach": ({"dials": {"power": 2.6}}, "The dial of power goes from -2.5 to 2.5"),
    "no number": ({"dials": {"power": float("nan")}}, "must be finite"),
    "a word": ({"dials": {"power": "1"}}, "must be a number"),
    "no dials": ({"dials": [1.0]}, "Dials must be given"),
    "a negative seed": ({"seed": -1}, "The seed must be a whole number"),
    "half a seed": ({"seed": 0.5}, "The seed must be a whole number"),
    "no seed": ({"seed": None}, "The seed must be a whole number"),
    "too many tokens": ({"max_new_tokens": 257}, "must be a whole number from 1 to 256"),
    "no tokens": ({"max_new_tokens": 0}, "must be a whole number from 1 to 256"),
    "hot": ({"temperature": 2.1}, "must be a number from 0 to 2"),
    "cold": ({"temperature": float("-inf")}, "must be a number from 0 to 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_may_not_be_asked_is_refused_before_anything_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(limits=Limits(prompt_tokens=200))
    counted = Counted(engine, monkeypatch)
    options, sentence = REFUSED[name]
    given = {"history": [], "question": QUESTION, "dials": DIALS, **options}
    with pytest.raises(NeVAError, match=sentence):
        engine.stream(given.pop("history"), given.pop("question"), given.pop("dials"), **given)
    assert counted.passes == 0
    assert engine.busy == 0


def test_the_context_of_the_model_is_a_limit_too() -> None:
    base = base_model(max_position_embeddings=60)
    engine = Engine.of(base, tokenizer(), random_map(base))
    with pytest.raises(NeVAError, match="which reads 48 here"):
        ask(engine, max_new_tokens=12)
    assert ask(engine, question="Why?", max_new_tokens=12).done


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RuntimeError("about " + QUESTION), "The model failed with RuntimeError"),
        (MemoryError(), "ran out of memory"),
        (torch.OutOfMemoryError(QUESTION), "ran out of memory"),
        (NeVAError("A sentence."), "^A sentence.$"),
    ],
)
def test_what_goes_wrong_in_the_model_is_a_sentence_and_the_next_visitor_is_served(
    error: Exception, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine()

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(engine.model.get_base_model(), "forward", broken)
        with pytest.raises(NeVAError, match=sentence) as caught:
            ask(engine)
    assert QUESTION not in str(caught.value)
    assert ask(engine).done


def test_nothing_that_a_visitor_writes_is_logged(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    engine = tiny_engine()
    ask(engine, history=HISTORY)
    monkeypatch.setattr(engine.model.get_base_model(), "forward", lambda *args, **kwargs: [QUESTION][1])
    with pytest.raises(NeVAError):
        ask(engine, history=HISTORY)
    written = caplog.text + "".join(capfd.readouterr())
    assert "The model failed with IndexError" in written
    assert not any(text in written for text in (QUESTION, *HISTORY[0]))


def test_a_map_that_dials_itself_leaves_the_base_side_alone() -> None:
    assert ask(tiny_engine(default_strengths={"power": 2.0})) == ask(tiny_engine())


def test_strengths_beyond_the_fluent_range_are_told_and_not_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    engine = tiny_engine(ranges={"power": [-0.5, 1.0]})
    assert engine.ranges["power"] == (-0.5, 1.0)
    assert engine.beyond({"power": 1.5, "security": 1.5}) == ["power"]
    assert ask(engine, {"power": 1.5}) == ask(tiny_engine(), {"power": 1.5})
    assert not [one for one in recwarn if "outside the range" in str(one.message)]


def test_gates_are_used_when_asked_for() -> None:
    engine = tiny_engine(gate=True, gate_probability=0.5)
    assert engine.has_gate
    with_gates, without = ask(engine, gate=True), ask(engine)
    bare = {name: replace(edits, gate_weight=None, gate_bias=None) for name, edits in engine.map.modules.items()}
    config = replace(engine.map.config, use_gate=False)
    assert without == ask(Engine.of(base_model(), tokenizer(), NeuronMap(config, bare)))
    assert with_gates.base == without.base
    assert with_gates.edited != without.edited


def test_a_map_of_another_model_does_not_fit() -> None:
    other = random_map(tiny_model(hidden_size=16))
    with pytest.raises(NeVAError, match="The map does not fit .*hidden_size"):
        Engine.of(base_model(), tokenizer(), other)


@pytest.mark.parametrize("named", [True, False])
def test_a_map_is_loaded_with_the_base_model_that_it_names_or_another(named: bool, tmp_path: Path) -> None:
    base, neuron_map = saved(tmp_path)
    engine = Engine.load(str(neuron_map), None if named else str(base), device="cpu")
    assert engine.name == "map"
    assert engine.source == str(neuron_map)
    assert engine.base_name == str(base)
    assert ask(engine) == ask(tiny_engine())


def test_without_a_base_model_nothing_is_loaded(tmp_path: Path) -> None:
    random_map(base_model()).save_pretrained(tmp_path)
    with pytest.raises(NeVAError, match="does not name its base model"):
        Engine.load(str(tmp_path))


def test_values_stand_in_the_order_of_their_circle_with_what_they_mean() -> None:
    engine = tiny_engine()
    assert engine.values == ["power", "security", "benevolence"]
    assert engine.label("benevolence") == "Benevolence"
    assert engine.system.has_circle
    strange = tiny_engine(values=["luck", "self_doubt"])
    assert strange.values == ["luck", "self_doubt"]
    assert strange.label("self_doubt") == "Self doubt"
    assert not strange.system.has_circle


def test_no_engine_needs_gradio() -> None:
    code = "import sys, neva_hf, neva_hf.space.engine, neva_hf.space.take_home, neva_hf.space.insight, neva_hf.space.sweep"
    done = subprocess.run([sys.executable, "-c", f"{code}; print('gradio' in sys.modules)"], capture_output=True)
    assert done.stdout.strip() == b"False", done.stderr
