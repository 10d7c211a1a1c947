"""Edits merged into the weights of a base model, saved, and loaded again by transformers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import LOAD_MERGED, STRENGTHS, left_in, live_model, logits, logits_alone
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from neva_hf import NeuronMap, NeVAError
from neva_hf.export import export_merged, merge
from neva_hf.export.check import CHECK_PROMPTS


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_merged_model_says_the_same_in_a_process_without_neva_hf(
    architecture: str, gain: bool, tmp_path: Path
) -> None:
    model = live_model(architecture, gain=gain)
    made = export_merged(model, tmp_path / "out", STRENGTHS)
    alone = logits_alone(LOAD_MERGED, made.path, tmp_path)
    torch.testing.assert_close(alone, logits(model, strengths=STRENGTHS), atol=1e-5, rtol=0)
    assert (alone - logits(model)).abs().max() > 0.1


@pytest.mark.parametrize("architecture", ["opt", "gpt_neox", "bloom"])
def test_architectures_with_a_bias_of_their_own_get_the_edit_there(architecture: str, tmp_path: Path) -> None:
    model = live_model(architecture, gain=True)
    made = export_merged(model, tmp_path / "out", STRENGTHS)
    loaded = AutoModelForCausalLM.from_pretrained(made.path)
    torch.testing.assert_close(logits(loaded), logits(model, strengths=STRENGTHS), atol=1e-5, rtol=0)


def test_a_merged_llama_has_a_bias_in_all_its_mlps_that_is_0_but_where_the_edit_is(tmp_path: Path) -> None:
    model = live_model(later=True)
    made = export_merged(model, tmp_path / "out", STRENGTHS)
    assert json.loads((made.path / "config.json").read_text())["mlp_bias"] is True
    biases = {key: bias for key, bias in load_file(made.path / "model.safetensors").items() if key.endswith(".bias")}
    edited = "model.layers.1.mlp.down_proj.bias"
    names = [f"model.layers.{n}.mlp.{part}_proj.bias" for n in range(2) for part in ("gate", "up", "down")]
    assert sorted(biases) == sorted(names)
    assert {name for name, bias in biases.items() if bias.any()} == {edited}


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3", "falcon", "phi3"])
def test_an_architecture_that_would_drop_the_bias_is_refused_and_stock_is_named(
    architecture: str, tmp_path: Path
) -> None:
    with pytest.raises(NeVAError, match=r"silently drop.*neva export stock"):
        export_merged(live_model(architecture), tmp_path / "out", STRENGTHS)
    assert left_in(tmp_path) == []


def test_gains_alone_need_no_bias(tmp_path: Path) -> None:
    model = live_model("qwen2", gain=True)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "neva_shift"):
                module.neva_shift["default"].zero_()
    made = export_merged(model, tmp_path / "out", STRENGTHS)
    loaded = AutoModelForCausalLM.from_pretrained(made.path)
    torch.testing.assert_close(logits(loaded), logits(model, strengths=STRENGTHS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merged_model_keeps_its_dtype_and_every_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    neuron_map = NeuronMap.from_model(live_model(folder=tmp_path / "base"))
    # (Loaded in its dtype: casting a float32 model would round what is never saved, the rotary frequencies.)
    model = neuron_map.apply_to(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype))
    made = export_merged(model, tmp_path / "out", STRENGTHS, tokenizer=tiny_tokenizer())
    loaded = AutoModelForCausalLM.from_pretrained(made.path)
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), logits(model, strengths=STRENGTHS))


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = live_model("gpt2")
    assert model.get_base_model().config.tie_word_embeddings
    made = export_merged(model, tmp_path / "out", STRENGTHS)
    assert "lm_head.weight" not in load_file(made.path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(made.path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    model = live_model()
    made = export_merged(model, tmp_path / "out", STRENGTHS)
    assert AutoTokenizer.from_pretrained(made.path)("he").input_ids == model.tokenizer("he").input_ids


def test_a_bias_that_gets_lost_on_the_way_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = merge._save

    def forgetful(twin: Any, tokenizer: Any, folder: Path) -> None:
        twin.config.mlp_bias = False
        save(twin, tokenizer, folder)

    monkeypatch.setattr(merge, "_save", forgetful)
    with pytest.raises(NeVAError, match=r"does not load all of the merged model.*down_proj.bias"):
        export_merged(live_model(later=True), tmp_path / "out", STRENGTHS)
    assert left_in(tmp_path) == []


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    model = live_model()
    layer = model.get_base_model().get_submodule("model.layers.0.mlp.down_proj")

    class Packed(torch.nn.Linear):
        pass

    packed = Packed(layer.base_layer.in_features, layer.base_layer.out_features, bias=False)
    packed.weight = layer.base_layer.weight
    layer.base_layer = packed
    with pytest.raises(NeVAError, match=r"Packed without a plain floating-point weight.*neva export stock"):
        export_merged(model, tmp_path / "out", STRENGTHS)
    assert left_in(tmp_path) == []


def test_offloaded_weights_are_refused(tmp_path: Path) -> None:
    model = live_model()
    model.get_base_model().model.norm.weight = torch.nn.Parameter(torch.empty(32, device="meta"))
    with pytest.raises(NeVAError, match="offloaded"):
        export_merged(model, tmp_path / "out", STRENGTHS)


def test_the_check_runs_on_real_questions() -> None:
    assert len(CHECK_PROMPTS) >= 3
    assert all(prompt[-1] in "?." for prompt in CHECK_PROMPTS)
