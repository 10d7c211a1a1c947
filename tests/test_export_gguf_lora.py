"""Control vectors with a LoRA adapter beside them, for maps with gains: read back and held against the live model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from exports import PROMPT, STRENGTHS, left_in, live_model
from gguf import GGUFReader
from tiny import random_map, tiny_reader, tiny_tokenizer

from neva_hf import NeuronMap, NeVAError
from neva_hf.dial import dialled, neva_layers
from neva_hf.export import export_gguf, gguf
from neva_hf.export.gguf import read_directions
from neva_hf.export.gguf_lora import read_adapter


@pytest.mark.parametrize(
    "architecture", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gpt2", "bloom", "gpt_neox", "falcon"]
)
def test_the_pair_of_files_holds_what_each_block_of_the_live_model_adds(architecture: str, tmp_path: Path) -> None:
    model = live_model(architecture, gain=True, later=True, units={"power": [0.5, 2.0]})
    made = export_gguf(model, tmp_path / "out.gguf", STRENGTHS)
    assert made.adapter == tmp_path / "out-lora.gguf"
    added: dict[int, torch.Tensor] = {}
    inputs: dict[int, torch.Tensor] = {}
    for layer in neva_layers(model):
        number = int(next(part for part in layer.module_name.split(".") if part.isdecimal()))

        def hook(module: object, given: tuple[torch.Tensor], output: torch.Tensor, number: int = number) -> None:
            inputs[number] = given[0]
            added[number] = output - module.base_layer(given[0])  # type: ignore[attr-defined]

        layer.register_forward_hook(hook)
    with torch.inference_mode(), dialled(model, STRENGTHS):
        model(torch.tensor(PROMPT))
    vector, adapter = read_directions(made.path), read_adapter(made.adapter)
    assert vector.keys() == adapter.keys() == added.keys() == {1}
    first, second = adapter[1]
    assert first.dtype == second.dtype == torch.float32
    gains = inputs[1] @ first.T @ second.T
    torch.testing.assert_close(vector[1] + gains, added[1], atol=2e-5, rtol=0)
    assert gains.abs().max() > 0.05
    assert made.check.difference < 1e-4


def test_the_adapter_has_the_fields_and_shapes_that_llama_cpp_reads(tmp_path: Path) -> None:
    made = export_gguf(
        live_model("qwen2", gain=True, later=True), tmp_path / "out.gguf", STRENGTHS, source="someone/map"
    )
    assert made.adapter is not None
    reader = GGUFReader(made.adapter)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "qwen2"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 1.0
    # (what llama.cpp calls ne: the fastest axis first)
    assert [(tensor.name, tensor.tensor_type.name, list(tensor.shape)) for tensor in reader.tensors] == [
        ("blk.1.ffn_down.weight.lora_a", "F32", [64, 6]),
        ("blk.1.ffn_down.weight.lora_b", "F32", [6, 32]),
    ]
    assert json.loads(fields["neva.export"])["neuron_map"] == "someone/map"
    assert made.to_dict()["lora_adapter"] == str(made.adapter)


def changed(**parts: int) -> NeuronMap:
    """A map with gains; of the named tensors (`shift0` is the first block's shift), only so many neurons are kept."""
    neuron_map = random_map(tiny_reader(), gain=True)
    for number, edits in enumerate(neuron_map.modules.values()):
        assert edits.gain is not None
        for name, tensor in (("shift", edits.shift), ("gain", edits.gain)):
            tensor[:, parts.get(f"{name}{number}", tensor.shape[1]) :] = 0
    return neuron_map


@pytest.mark.parametrize(
    ("parts", "vector", "ranks"),
    [
        ({"shift0": 0, "gain0": 2}, {1}, {0: 2, 1: 6}),
        ({"shift0": 0, "gain1": 0}, {1}, {0: 6}),
        ({"shift0": 0, "shift1": 0, "gain1": 3}, {1}, {0: 6, 1: 3}),
        ({"shift0": 0, "gain0": 0, "gain1": 1}, {1}, {1: 1}),
    ],
    ids=["two ranks", "gains in the first block, shifts in the second", "gains alone", "one neuron"],
)
def test_blocks_may_have_gains_of_other_ranks_than_others_or_none(
    parts: dict[str, int], vector: set[int], ranks: dict[int, int], tmp_path: Path
) -> None:
    model = changed(**parts).apply_to(tiny_reader())
    model.tokenizer = tiny_tokenizer()
    made = export_gguf(model, tmp_path / "out.gguf", STRENGTHS)
    assert made.adapter is not None
    assert read_directions(made.path).keys() == vector
    assert {number: len(first) for number, (first, _) in read_adapter(made.adapter).items()} == ranks
    assert made.check.difference < 1e-4
    assert made.check.effect > 0.05


def test_shifts_of_the_first_block_are_refused_with_gains_as_well(tmp_path: Path) -> None:
    with pytest.raises(NeVAError, match=r"shifts the first decoder block.*neva export merge"):
        export_gguf(live_model(gain=True), tmp_path / "out.gguf", STRENGTHS)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "opt"])
def test_architectures_that_are_not_known_to_be_exact_are_refused_with_gains_as_well(
    architecture: str, tmp_path: Path
) -> None:
    with pytest.raises(NeVAError, match=r"neva export stock"):
        export_gguf(live_model(architecture, gain=True, later=True), tmp_path / "out.gguf", STRENGTHS)
    assert left_in(tmp_path) == []


def test_an_adapter_that_is_off_is_refused_and_neither_file_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        gguf, "read_adapter", lambda file: {n: (a, b * 1.3) for n, (a, b) in read_adapter(file).items()}
    )
    with pytest.raises(
        NeVAError, match=r"The control vector with its LoRA adapter does not say .* differs by [0-9.]+"
    ):
        export_gguf(live_model(gain=True, later=True), tmp_path / "out.gguf", STRENGTHS)
    assert left_in(tmp_path) == []


def test_an_adapter_that_is_there_is_replaced_by_force_alone(tmp_path: Path) -> None:
    model = live_model(gain=True, later=True)
    (tmp_path / "out-lora.gguf").write_bytes(b"mine")
    with pytest.raises(NeVAError, match=r"out-lora\.gguf already.*--force"):
        export_gguf(model, tmp_path / "out.gguf", STRENGTHS)
    assert left_in(tmp_path) == ["out-lora.gguf"]
    made = export_gguf(model, tmp_path / "out.gguf", STRENGTHS, force=True)
    assert made.adapter is not None
    assert read_adapter(made.adapter)
    assert left_in(tmp_path) == ["out-lora.gguf", "out.gguf"]


def test_a_control_vector_that_replaces_a_pair_leaves_no_adapter_that_would_not_belong_to_it(tmp_path: Path) -> None:
    export_gguf(live_model(gain=True, later=True), tmp_path / "out.gguf", STRENGTHS)
    made = export_gguf(live_model(later=True), tmp_path / "out.gguf", STRENGTHS, force=True)
    assert made.adapter is None
    assert left_in(tmp_path) == ["out.gguf"]
    (tmp_path / "out-lora.gguf").write_bytes(b"mine")
    export_gguf(live_model(later=True), tmp_path / "out.gguf", STRENGTHS, force=True)
    assert left_in(tmp_path) == ["out-lora.gguf", "out.gguf"]
