"""Stock adapters for maps with gains: LoRA adapters, loaded by PEFT alone."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import LOAD_STOCK, STRENGTHS, left_in, live_model, logits, logits_alone
from peft import PeftModel
from safetensors.torch import load_file
from tiny import ARCHITECTURES, VALUES, random_map, tiny_reader, tiny_tokenizer
from torch import nn

from neva_hf import NeuronMap, NeVAError
from neva_hf.export import export_stock, stock
from neva_hf.projection import columns
from neva_hf.strengths import scale_by_units

MODULE = "model.layers.{}.mlp.down_proj"


def loaded(folder: Path, architecture: str = "llama") -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`lora_bias=True` was passed")
        return PeftModel.from_pretrained(tiny_reader(architecture), str(folder)).eval()


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_an_adapter_with_gains_says_the_same_in_a_process_without_neva_hf(architecture: str, tmp_path: Path) -> None:
    model = live_model(architecture, gain=True, folder=tmp_path / "base")
    made = export_stock(model, tmp_path / "out", STRENGTHS)
    alone = logits_alone(LOAD_STOCK, made.path, tmp_path)
    torch.testing.assert_close(alone, logits(model, strengths=STRENGTHS), atol=1e-5, rtol=0)
    assert (alone - logits(model)).abs().max() > 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peft_alone_says_what_a_live_model_with_gains_says(architecture: str, tmp_path: Path) -> None:
    model = live_model(architecture, gain=True, units={"power": [0.5, 2.0]})
    made = export_stock(model, tmp_path / "out", STRENGTHS)
    assert json.loads((made.path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    adapter = loaded(made.path, architecture)
    torch.testing.assert_close(logits(adapter), logits(model, strengths=STRENGTHS), atol=1e-5, rtol=0)
    with adapter.disable_adapter():
        assert torch.equal(logits(adapter), logits(tiny_reader(architecture)))
    assert made.check.difference < 1e-4
    assert made.check.effect > 0.1


def test_gpt2_without_gains_has_a_stock_adapter_as_well(tmp_path: Path) -> None:
    model = live_model("gpt2")
    made = export_stock(model, tmp_path / "out", STRENGTHS)
    torch.testing.assert_close(
        logits(loaded(made.path, "gpt2")), logits(model, strengths=STRENGTHS), atol=1e-5, rtol=0
    )
    written = load_file(made.path / "adapter_model.safetensors")
    assert not any(tensor.any() for name, tensor in written.items() if name.endswith("lora_B.weight"))


def test_an_adapter_holds_the_columns_times_the_gains_and_the_folded_shifts(tmp_path: Path) -> None:
    units = {"power": [0.25, 3.0], "benevolence": [1.0, 2.0]}
    model = live_model(gain=True, units=units)
    made = export_stock(model, tmp_path / "out", STRENGTHS)
    written = load_file(made.path / "adapter_model.safetensors")
    neuron_map = NeuronMap.from_model(model)
    coefficients = scale_by_units(torch.tensor([[1.0, -0.5, 0.0]]), VALUES, units)
    assert len(written) == 3 * len(neuron_map.modules)
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    for name, edits in neuron_map.modules.items():
        assert edits.gain is not None
        layer = model.get_base_model().get_submodule(name).base_layer
        pick, write, shift = (
            written[f"base_model.model.{name}.lora_{part}"] for part in ("A.weight", "B.weight", "B.bias")
        )
        assert pick.sum() == edits.index.numel()
        assert pick.sum(1).eq(1).all()
        written_by = columns(layer, edits.index)
        expected = written_by.T * (coefficients @ edits.gain)
        torch.testing.assert_close((write @ pick)[:, edits.index.long()], expected)
        torch.testing.assert_close(shift, (coefficients @ edits.shift @ written_by)[0])


def test_each_module_has_the_rank_of_its_gains_and_a_scaling_of_1(tmp_path: Path) -> None:
    base = tiny_reader()
    neuron_map = random_map(base, gain=True)
    first, second = (neuron_map.modules[MODULE.format(number)] for number in range(2))
    assert first.gain is not None
    assert second.gain is not None
    first.gain[:, 2:] = 0
    model = neuron_map.apply_to(base)
    model.tokenizer = tiny_tokenizer()
    made = export_stock(model, tmp_path / "out", STRENGTHS)
    config = json.loads((made.path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (6, 6)
    assert config["rank_pattern"] == config["alpha_pattern"] == {MODULE.format(0): 2}
    layers = [layer for layer in loaded(made.path).modules() if hasattr(layer, "lora_A")]
    assert [layer.r["default"] for layer in layers] == [2, 6]
    assert [layer.scaling["default"] for layer in layers] == [1, 1]


def test_a_module_that_is_only_shifted_gets_a_rank_of_zeros(tmp_path: Path) -> None:
    base = tiny_reader()
    neuron_map = random_map(base, gain=True)
    shifted = neuron_map.modules[MODULE.format(1)]
    assert shifted.gain is not None
    shifted.gain.zero_()
    model = neuron_map.apply_to(base)
    model.tokenizer = tiny_tokenizer()
    made = export_stock(model, tmp_path / "out", STRENGTHS)
    torch.testing.assert_close(logits(loaded(made.path)), logits(model, strengths=STRENGTHS), atol=1e-5, rtol=0)
    written = load_file(made.path / "adapter_model.safetensors")
    assert written[f"base_model.model.{MODULE.format(1)}.lora_B.weight"].shape == (32, 1)
    assert not written[f"base_model.model.{MODULE.format(1)}.lora_B.weight"].any()
    assert written[f"base_model.model.{MODULE.format(1)}.lora_B.bias"].any()


def test_gains_that_are_0_at_these_strengths_make_a_beft_adapter(tmp_path: Path) -> None:
    base = tiny_reader()
    neuron_map = random_map(base, gain=True)
    for edits in neuron_map.modules.values():
        assert edits.gain is not None
        edits.gain[VALUES.index("power")] = 0
    model = neuron_map.apply_to(base)
    model.tokenizer = tiny_tokenizer()
    made = export_stock(model, tmp_path / "out", {"power": 1.0})
    assert json.loads((made.path / "adapter_config.json").read_text())["peft_type"] == "BEFT"
    assert "BEFT" in (made.path / "README.md").read_text()


def test_the_same_export_twice_is_the_same_file(tmp_path: Path) -> None:
    one, other = (export_stock(live_model(gain=True), tmp_path / name, STRENGTHS) for name in ("one", "other"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (one.path / name).read_bytes() == (other.path / name).read_bytes()
    assert "LoRA" in (one.path / "README.md").read_text()


@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "lora_B.bias"])
def test_an_adapter_with_a_wrong_part_is_refused(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = stock._write

    def write_wrong(folder: Path, tensors: Any, config: Any) -> None:
        write(folder, {name: tensor * (1.3 if name.endswith(part) else 1) for name, tensor in tensors.items()}, config)

    monkeypatch.setattr(stock, "_write", write_wrong)
    with pytest.raises(NeVAError, match=r"a logit differs by \d.*Nothing was written"):
        export_stock(live_model(gain=True), tmp_path / "out", STRENGTHS)
    assert left_in(tmp_path) == []


def test_an_adapter_with_another_scaling_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = stock._write
    monkeypatch.setattr(
        stock, "_write", lambda folder, tensors, config: write(folder, tensors, replace(config, lora_alpha=8))
    )
    with pytest.raises(NeVAError, match="a logit differs"):
        export_stock(live_model(gain=True), tmp_path / "out", STRENGTHS)


def test_layers_that_peft_does_not_take_are_refused_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock, "innermost", lambda layer: nn.Identity())
    with pytest.raises(NeVAError, match=r"is a Identity.*neva export merge"):
        export_stock(live_model(gain=True), tmp_path / "out", STRENGTHS)
    assert left_in(tmp_path) == []


def test_a_model_in_bfloat16_keeps_its_gains_in_float32(tmp_path: Path) -> None:
    model = live_model(gain=True).to(torch.bfloat16)
    made = export_stock(model, tmp_path / "out", STRENGTHS)
    assert made.check.difference < made.check.effect / 4
    written = load_file(made.path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
