"""`neva export`: what it writes, what it says, and what it refuses before a model is loaded."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from exports import left_in, live_model, logits
from peft import AutoPeftModelForCausalLM
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from neva_hf import NeuronMap, NeVAModel, base
from neva_hf.cli import app

SETTINGS = ["--strengths", "benevolence=1,power=-0.5"]
STRENGTHS = {"benevolence": 1.0, "power": -0.5}


@pytest.fixture(autouse=True)
def libraries_as_they_were(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command line quietens libraries for its whole process."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.delenv("NEVA_DEBUG", raising=False)
    verbosity = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


@pytest.fixture
def live(tmp_path: Path) -> NeVAModel:
    """A model whose base is saved in `base` and whose map is saved in `map`."""
    model = live_model(folder=tmp_path / "base", later=True)
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    NeuronMap.from_model(model).save_pretrained(tmp_path / "map")
    return model


def run(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["export", *map(str, arguments)])
    return done.exit_code, done.stdout, " ".join(done.stderr.split())


@pytest.mark.parametrize(("kind", "loader"), [("stock", AutoPeftModelForCausalLM), ("merge", AutoModelForCausalLM)])
def test_an_exported_folder_says_what_the_live_model_says(
    kind: str, loader: Any, live: NeVAModel, tmp_path: Path
) -> None:
    code, out, _ = run(kind, tmp_path / "map", tmp_path / "out", *SETTINGS)
    assert code == 0
    assert "the largest difference of a logit is" in out
    assert "Saved to" in out
    loaded = loader.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(loaded), logits(live, strengths=STRENGTHS), atol=1e-5, rtol=0)


def test_with_json_standard_output_is_one_document(live: NeVAModel, tmp_path: Path) -> None:
    code, out, err = run("gguf", tmp_path / "map", tmp_path / "out.gguf", *SETTINGS, "--json")
    assert code == 0
    told = json.loads(out)
    assert told["kind"] == "gguf"
    assert told["strengths"] == STRENGTHS
    assert told["path"] == str(tmp_path / "out.gguf")
    assert 0 <= told["largest_logit_difference"] < 1e-4
    assert "Saved to" in err
    assert (tmp_path / "out.gguf").is_file()


def test_a_pair_of_files_is_named_with_how_llama_cpp_takes_both(tmp_path: Path) -> None:
    model = live_model(folder=tmp_path / "base", later=True, gain=True)
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    NeuronMap.from_model(model).save_pretrained(tmp_path / "map")
    vector, adapter = tmp_path / "out.gguf", tmp_path / "out-lora.gguf"
    code, out, _ = run("gguf", tmp_path / "map", vector, *SETTINGS)
    assert code == 0
    assert f"Saved to {vector} and {adapter}" in out
    assert f"llama-cli -m BASE.gguf --control-vector {vector} --lora {adapter}" in out
    code, out, _ = run("gguf", tmp_path / "map", vector, *SETTINGS, "--force", "--json")
    assert code == 0
    assert json.loads(out)["lora_adapter"] == str(adapter)


def test_the_base_model_can_be_another_than_the_map_names(live: NeVAModel, tmp_path: Path) -> None:
    (tmp_path / "base").rename(tmp_path / "moved")
    assert run("stock", tmp_path / "map", tmp_path / "out", *SETTINGS)[0] == 1
    code, *_ = run("stock", tmp_path / "map", tmp_path / "out", *SETTINGS, "--base", tmp_path / "moved")
    assert code == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "moved")


def test_the_strengths_of_the_map_are_the_default(live: NeVAModel, tmp_path: Path) -> None:
    code, _, err = run("stock", tmp_path / "map", tmp_path / "out")
    assert (code, "say what to freeze, such as --strengths benevolence=1" in err) == (1, True)
    neuron_map = NeuronMap.from_pretrained(tmp_path / "map")
    neuron_map.config.default_strengths = {"security": 0.5}
    neuron_map.save_pretrained(tmp_path / "map")
    code, out, _ = run("stock", tmp_path / "map", tmp_path / "out", "--json")
    assert code == 0
    assert json.loads(out)["strengths"] == {"security": 0.5}


def test_force_replaces_an_earlier_export(live: NeVAModel, tmp_path: Path) -> None:
    assert run("stock", tmp_path / "map", tmp_path / "out", *SETTINGS)[0] == 0
    code, _, err = run("stock", tmp_path / "map", tmp_path / "out", *SETTINGS)
    assert (code, "--force" in err) == (1, True)
    assert run("stock", tmp_path / "map", tmp_path / "out", *SETTINGS, "--force")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stock", "{map}", "{tmp}/out", "--strengths", "benevolance=1"], "did you mean 'benevolence'"),
        (["stock", "{map}", "{tmp}/out", "--strengths", "power"], "VALUE=NUMBER"),
        (["stock", "{map}", "{tmp}/out", "--strengths", "power=0"], "All strengths are 0"),
        (["merge", "{map}", "{tmp}/out", *SETTINGS, "--dtype", "int4"], "choose one of auto, float32"),
        (["merge", "{map}", "{map}", *SETTINGS, "--force"], "other things than an export"),
        (["gguf", "{map}", "{tmp}/out", *SETTINGS], "must end in .gguf"),
        (["stock", "{tmp}/nowhere", "{tmp}/out", *SETTINGS], "There is no folder"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_before_a_model_is_loaded(
    arguments: list[str], message: str, live: NeVAModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "load_base", lambda *args, **options: pytest.fail("a model was loaded"))
    before = left_in(tmp_path)
    code, out, err = run(*(text.format(map=tmp_path / "map", tmp=tmp_path) for text in arguments))
    assert (code, out) == (1, "")
    assert err.startswith("Error: ")
    assert message in err
    assert left_in(tmp_path) == before
