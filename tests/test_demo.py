"""The demo from end to end on the embedded default model, with sizes that a test can wait for."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import random_map, tiny_reader, tiny_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typer.testing import CliRunner

from neva_hf import NeuronMap, NeVAError, NeVAModel, demo
from neva_hf.base import DEFAULT_BASE
from neva_hf.cli import app
from neva_hf.demo import run_demo
from neva_hf.scenarios import load_neutral_texts

Pair = tuple[PreTrainedModel, PreTrainedTokenizerBase]
VALUES = ["benevolence", "stimulation"]


def console() -> Console:
    return Console(file=io.StringIO(), width=120, highlight=False)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"_TRAIN": 8, "_CALIBRATION": 1, "_DEV": 5, "_HELDOUT": 1}.items():
        monkeypatch.setattr(demo, name, size)
    monkeypatch.setattr(demo, "QUESTIONS", demo.QUESTIONS[:1])
    monkeypatch.setattr(
        demo,
        "load_neutral_texts",
        lambda split, limit: [" ".join(text.split()[:30]) for text in load_neutral_texts(split, limit)],
    )


@pytest.mark.usefixtures("small")
def test_the_demo_finds_two_values_saves_them_and_their_dials_do_what_they_say(
    embedded_base: Pair, embedded_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEVA_CACHE", str(embedded_cache))
    monkeypatch.setattr("neva_hf.base._hub_answers", lambda token: False)
    monkeypatch.setattr("neva_hf.base.try_to_load_from_cache", lambda *args, **kwargs: None)
    screen = console()
    told = run_demo(screen, values=VALUES, output=tmp_path / "map", max_new_tokens=6)

    neuron_map = NeuronMap.from_pretrained(tmp_path / "map")
    assert told["map"] == str(tmp_path / "map")
    assert told["values"] == neuron_map.values == VALUES
    assert neuron_map.base_model == DEFAULT_BASE
    assert all(sum(counts.values()) == 200 for counts in neuron_map.neuron_counts().values())
    assert neuron_map.config.value_system is not None

    settings = [{value: strength} for value in VALUES for strength in (-2.0, 1.0, 2.0)]
    assert [effect["strengths"] for effect in told["effects"]] == settings
    for effect in told["effects"]:
        ((_, strength),) = effect["strengths"].items()
        assert effect["margin_shift"] * strength > 0
        assert 0.01 < effect["kl"] < 0.8
        assert 0.8 < effect["perplexity_ratio"] < 2
    (heard,) = told["answers"]
    assert heard["question"] == demo.QUESTIONS[0]
    assert [answer["strengths"] for answer in heard["answers"]] == [{}, *settings]
    assert all(answer["text"] for answer in heard["answers"])
    assert json.loads(json.dumps(told)) == told
    assert isinstance(screen.file, io.StringIO)
    assert str(tmp_path / "map") in screen.file.getvalue().replace("\n", "")


@pytest.fixture
def tiny_map(tmp_path: Path, small: None) -> Path:
    """A map of a tiny model in a folder, with two values of the shipped scenarios and one that they do not know."""
    model = tiny_reader()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    values = ["power", "security", "humour"]
    neuron_map = random_map(model, values=values, base_model_name_or_path=str(tmp_path / "model"))
    return neuron_map.save_pretrained(tmp_path / "map")


def test_a_map_that_is_given_is_not_searched_for(tiny_map: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "identify_neurons", None)
    told = run_demo(console(), map_source=str(tiny_map), values=["security", "stimulation"], max_new_tokens=2)
    assert told["map"] == str(tiny_map)
    assert told["values"] == ["security"]
    assert [effect["strengths"]["security"] for effect in told["effects"]] == [-2.0, 1.0, 2.0]
    # None of the values that were asked for: the map's first two.
    told = run_demo(console(), map_source=str(tiny_map), strengths=[1.0], max_new_tokens=2)
    assert told["values"] == ["power", "security"]
    assert [effect["strengths"] for effect in told["effects"]] == [{"power": 1.0}, {"security": 1.0}]


def test_the_effects_are_those_of_measuring_each_setting_alone(tiny_map: Path) -> None:
    told = run_demo(console(), map_source=str(tiny_map), values=["power"], max_new_tokens=2)
    model = NeVAModel.from_pretrained(tiny_map)
    for effect in told["effects"]:
        (alone,) = demo._measure(console(), lambda items, what: items, model, [{}, effect["strengths"]])
        assert alone.margin_shift == pytest.approx(effect["margin_shift"], abs=1e-5)
        assert alone.kl == pytest.approx(effect["kl"], rel=1e-3)


def test_a_value_of_which_the_scenarios_do_not_speak_is_heard_but_not_measured(tiny_map: Path) -> None:
    told = run_demo(console(), map_source=str(tiny_map), values=["humour"], max_new_tokens=2)
    assert [effect["margin_shift"] for effect in told["effects"]] == [None, None, None]
    assert all(effect["kl"] > 0 for effect in told["effects"])


def test_an_output_that_is_a_file_is_refused_before_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(demo, "load_base", None)
    with pytest.raises(NeVAError, match="is a file; name a folder"):
        run_demo(console(), output=tmp_path / "file")


def test_the_command_passes_its_options_on_and_writes_one_json_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(demo, "run_demo", lambda screen, **options: asked.append(options) or {"seconds": 1})
    arguments = ["demo", "--values", "power, hedonism", "--output", str(tmp_path), "--map", "some/map", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, json.loads(result.stdout)) == (0, {"seconds": 1})
    assert asked == [{"map_source": "some/map", "values": ["power", "hedonism"], "output": tmp_path}]
