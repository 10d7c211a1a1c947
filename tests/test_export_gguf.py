"""Control vectors for llama.cpp, read back and held against what the live model adds."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from exports import PROMPT, STRENGTHS, left_in, live_model
from gguf import GGUFReader

from neva_hf import NeVAError
from neva_hf.dial import dialled, neva_layers
from neva_hf.export import export_gguf, export_stock, gguf
from neva_hf.export.gguf import ARCHITECTURES, read_directions


@pytest.mark.parametrize(
    "architecture", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gpt2", "bloom", "gpt_neox", "falcon"]
)
def test_a_control_vector_holds_what_each_block_of_the_live_model_adds(architecture: str, tmp_path: Path) -> None:
    model = live_model(architecture, later=True, units={"power": [0.5, 2.0]})
    made = export_gguf(model, tmp_path / "out.gguf", STRENGTHS)
    added: dict[int, torch.Tensor] = {}
    for layer in neva_layers(model):
        number = int(next(part for part in layer.module_name.split(".") if part.isdecimal()))

        def hook(module: object, inputs: tuple[torch.Tensor], output: torch.Tensor, number: int = number) -> None:
            added[number] = output - module.base_layer(inputs[0])  # type: ignore[attr-defined]

        layer.register_forward_hook(hook)
    with torch.inference_mode(), dialled(model, STRENGTHS):
        model(torch.tensor(PROMPT))
    read = read_directions(made.path)
    assert read.keys() == added.keys() == {1}
    for number, direction in read.items():
        assert direction.dtype == torch.float32
        every_token = added[number].reshape(-1, direction.numel())
        torch.testing.assert_close(every_token, direction.expand_as(every_token), atol=2e-5, rtol=0)
        assert direction.abs().max() > 0.1


def test_a_control_vector_has_the_fields_that_llama_cpp_reads(tmp_path: Path) -> None:
    made = export_gguf(live_model("qwen2", later=True), tmp_path / "out.gguf", STRENGTHS, source="someone/neva-map")
    reader = GGUFReader(made.path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "qwen2"
    assert fields["controlvector.layer_count"] == 1
    assert [(tensor.name, tensor.tensor_type.name, list(tensor.shape)) for tensor in reader.tensors] == [
        ("direction.1", "F32", [32])
    ]
    note = json.loads(fields["neva.export"])
    assert note["neuron_map"] == "someone/neva-map"
    assert note["strengths"] == STRENGTHS


def test_the_first_block_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NeVAError, match=r"first decoder block.*neva export merge"):
        export_gguf(live_model(), tmp_path / "out.gguf", STRENGTHS)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_a_norm_behind_the_network_is_refused(architecture: str, tmp_path: Path) -> None:
    model = live_model(architecture, later=True)
    with pytest.raises(
        NeVAError, match=r"a norm \(post_feedforward_layernorm\) follows.*neva export stock"
    ) as refused:
        export_gguf(model, tmp_path / "out.gguf", STRENGTHS)
    # What it names instead has to work: a merged Gemma cannot hold the edit either.
    assert "neva export merge" not in str(refused.value)
    assert export_stock(model, tmp_path / "stock", STRENGTHS).check.difference < 1e-3
    assert left_in(tmp_path) == ["stock"]


def test_an_architecture_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NeVAError, match=r"'opt', only for .*llama"):
        export_gguf(live_model("opt", later=True), tmp_path / "out.gguf", STRENGTHS)


def test_the_check_by_itself_finds_a_norm_behind_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "gemma3_text", "gemma3")
    with pytest.raises(NeVAError, match=r"The control vector does not say .* a logit differs by [0-9.]+"):
        export_gguf(live_model("gemma3", later=True), tmp_path / "out.gguf", STRENGTHS)
    assert left_in(tmp_path) == []


def test_modules_that_are_no_down_projections_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "find_down_projections", lambda base: {})
    with pytest.raises(NeVAError, match="no FFN down projection"):
        export_gguf(live_model(later=True), tmp_path / "out.gguf", STRENGTHS)


def test_names_that_cannot_be_a_control_vector_are_refused(tmp_path: Path) -> None:
    model = live_model(later=True)
    with pytest.raises(NeVAError, match=r"must end in \.gguf"):
        export_gguf(model, tmp_path / "out", STRENGTHS)
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(NeVAError, match="is a folder"):
        export_gguf(model, tmp_path / "folder.gguf", STRENGTHS, force=True)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    with pytest.raises(NeVAError, match=r"neva-hf\[cli\]"):
        export_gguf(live_model(later=True), tmp_path / "out.gguf", STRENGTHS)
