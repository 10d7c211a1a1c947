"""The two paths agree, and the edit is the same in every dtype, on every device and on quantized base models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from reference import edited
from test_bit_identical import assert_same_bits
from test_edit_against_reference import KINDS, ROWS, STRENGTHS, UNITS, assert_near
from tiny import ARCHITECTURES, batch, random_map, tiny_model, tiny_pair
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, PreTrainedModel, TorchAoConfig

from neva_hf import NeuronMap, NeVAError, NeVAModel
from neva_hf.config import NeVAConfig
from neva_hf.dial import neva_layers
from neva_hf.neuron_map import ModuleEdits

each_kind = pytest.mark.parametrize("kind", KINDS)
each_strengths = pytest.mark.parametrize("strengths", STRENGTHS.values(), ids=STRENGTHS)
each_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def logits(model: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(padding="left"), **kwargs).logits


def with_gains_of_zero(neuron_map: NeuronMap) -> NeuronMap:
    """The same edits, but on the general path."""
    modules = {
        name: ModuleEdits(edits.index, edits.shift, gain=torch.zeros_like(edits.shift))
        for name, edits in neuron_map.modules.items()
    }
    config = copy.deepcopy(neuron_map.config)
    config.use_gain = True
    return NeuronMap(config, modules)


# The two paths.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@each_strengths
def test_the_folded_and_the_general_path_agree(architecture: str, strengths: Any) -> None:
    _, folded, neuron_map = tiny_pair(architecture, units=UNITS)
    general = with_gains_of_zero(neuron_map).apply_to(tiny_model(architecture))
    with folded.strengths(strengths), general.strengths(strengths):
        assert not neva_layers(folded)[0].call.edit.general
        assert neva_layers(general)[0].call.edit.general
    got, wanted = logits(folded, strengths=strengths), logits(general, strengths=strengths)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@each_strengths
def test_rows_that_share_their_strengths_get_what_one_dict_gives(strengths: Any) -> None:
    _, model, _ = tiny_pair()
    shared = ROWS[0]
    assert_same_bits(logits(model, strengths=[shared] * 3), logits(model, strengths=shared))
    mixed = logits(model, strengths=[shared, shared, {}])
    assert_near(mixed[:2], logits(model, strengths=shared)[:2])


# Dtypes.


@each_half
@each_kind
@each_strengths
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_half_precision_is_near_the_float32_edit(
    architecture: str, kind: str, strengths: Any, dtype: torch.dtype
) -> None:
    base, model, _ = tiny_pair(architecture, dtype=dtype, units=UNITS, **KINDS[kind])
    exact, exact_model, _ = tiny_pair(architecture, units=UNITS, **KINDS[kind])
    # Gates may open or close on a rounded activation; everything else is near.
    got, wanted = logits(model, strengths=strengths), logits(exact_model, strengths=strengths)
    assert got.dtype == dtype
    rounding = (logits(base).float() - logits(exact)).abs().mean()
    moved = (wanted - logits(exact)).abs().mean()
    assert (got.float() - wanted).abs().mean() < 4 * rounding + 0.01 * moved


CASTS: dict[str, tuple[torch.dtype, Callable[[nn.Module], nn.Module]]] = {
    "to(bfloat16)": (torch.bfloat16, lambda model: model.to(torch.bfloat16)),
    "to(float16)": (torch.float16, lambda model: model.to(torch.float16)),
    "half()": (torch.float16, lambda model: model.half()),
    "bfloat16()": (torch.bfloat16, lambda model: model.bfloat16()),
    "double()": (torch.float64, lambda model: model.double()),
    "to('cpu')": (torch.float32, lambda model: model.to("cpu")),
    "there and back": (torch.float32, lambda model: model.double().float()),
}


@each_kind
@pytest.mark.parametrize("cast", CASTS)
def test_a_model_that_was_cast_edits_like_one_that_was_loaded_so(cast: str, kind: str) -> None:
    dtype, change = CASTS[cast]
    _, model, _ = tiny_pair(**KINDS[kind])
    _, wanted, _ = tiny_pair(dtype=dtype, **KINDS[kind])
    for one in (model, wanted):
        one.set_strengths(ROWS[0])
    change(model)
    assert model.dtype == dtype
    assert_same_bits_of(logits(model), logits(wanted))
    assert_same_bits_of(logits(model, strengths=ROWS), logits(wanted, strengths=ROWS))


def assert_same_bits_of(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert got.dtype == wanted.dtype
    assert torch.equal(got, wanted)


@each_half
@each_kind
def test_autocast_runs_the_edit(kind: str, dtype: torch.dtype) -> None:
    _, model, _ = tiny_pair(**KINDS[kind])
    wanted, plain = logits(model, strengths=ROWS), logits(model)
    with torch.autocast("cpu", dtype=dtype):
        got = logits(model, strengths=ROWS).float()
    assert (got - wanted).abs().mean() < 0.1 * (wanted - plain).abs().mean()


# Weights that change or move under an edit.


@each_kind
def test_weights_that_are_written_to_are_seen_by_the_next_edit(kind: str) -> None:
    base, model, neuron_map = tiny_pair(**KINDS[kind])
    model.set_strengths(ROWS[0])
    logits(model, strengths=ROWS)
    for one in (base, model.base_model.model):
        for layer in one.model.layers:
            projection = getattr(layer.mlp.down_proj, "base_layer", layer.mlp.down_proj)
            with torch.no_grad():
                projection.weight.mul_(-0.5)
    with edited(base, (neuron_map, ROWS)):
        assert_near(logits(model, strengths=ROWS), logits(base))
    model.set_strengths(ROWS[0])
    with edited(base, (neuron_map, ROWS[0])):
        assert_near(logits(model), logits(base))


@each_kind
def test_an_adapter_can_be_put_on_a_meta_model_and_filled_later(kind: str) -> None:
    base, wanted, neuron_map = tiny_pair(default_strengths={"power": 1.0}, **KINDS[kind])
    weights = base.state_dict()
    with torch.device("meta"):
        hollow = AutoModelForCausalLM.from_config(base.config).eval()
    model = get_peft_model(hollow, neuron_map.config, low_cpu_mem_usage=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    named = {name.replace("down_proj.weight", "down_proj.base_layer.weight"): weights[name] for name in weights}
    model.base_model.model.load_state_dict(named, strict=False, assign=True)
    model.base_model.model.tie_weights()
    for buffer in ("inv_freq", "original_inv_freq"):
        rotary = base.model.rotary_emb
        model.base_model.model.model.rotary_emb.register_buffer(buffer, getattr(rotary, buffer), persistent=False)
    set_peft_model_state_dict(model, neuron_map.state_dict(), low_cpu_mem_usage=True)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert_same_bits(logits(model), logits(wanted))
    assert_same_bits(logits(model, strengths=ROWS), logits(wanted, strengths=ROWS))


@each_kind
@each_strengths
@pytest.mark.parametrize("when", ["before loading", "after loading", "after setting strengths"])
def test_an_offloaded_model_is_edited_too(when: str, strengths: Any, kind: str) -> None:
    base, wanted, neuron_map = tiny_pair(**KINDS[kind])
    offloaded = tiny_model()
    if when == "before loading":
        cpu_offload(offloaded, torch.device("cpu"))
    model = neuron_map.apply_to(offloaded)
    if when == "after setting strengths":
        model.set_strengths(ROWS[2])
    if when != "before loading":
        cpu_offload(model, torch.device("cpu"))
    assert_same_bits(logits(model, strengths={}), logits(base))
    assert_near(logits(model, strengths=strengths), logits(wanted, strengths=strengths))
    if when == "after setting strengths":
        assert_near(logits(model), logits(wanted, strengths=ROWS[2]))
    model.set_strengths(ROWS[0])
    assert_near(logits(model), logits(wanted, strengths=ROWS[0]))


# Quantized base models.


def quantized(architecture: str = "llama", **overrides: Any) -> PreTrainedModel:
    model = tiny_model(architecture, **overrides)
    quantize_(model, Int8WeightOnlyConfig(version=2))
    return model


@pytest.mark.parametrize("architecture", ["llama", "opt", "gemma3"])
@each_kind
@each_strengths
def test_int8_base_models_are_edited_like_plain_hooks_on_them(architecture: str, kind: str, strengths: Any) -> None:
    base = quantized(architecture)
    neuron_map = random_map(base, units=UNITS, **KINDS[kind])
    model = neuron_map.apply_to(quantized(architecture))
    with edited(base, (neuron_map, strengths)):
        wanted = logits(base)
    torch.testing.assert_close(logits(model, strengths=strengths), wanted, atol=1e-4, rtol=1e-4)
    assert_same_bits(logits(model), logits(base))
    if isinstance(strengths, dict):
        model.set_strengths(strengths)
        torch.testing.assert_close(logits(model), wanted, atol=1e-4, rtol=1e-4)
    else:
        assert_same_bits(logits(model, strengths=strengths)[1], logits(base)[1])


@each_kind
def test_int8_base_models_generate_like_plain_hooks_on_them(kind: str) -> None:
    base = quantized()
    neuron_map = random_map(base, **KINDS[kind])
    model = neuron_map.apply_to(quantized())
    options: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 2}
    with edited(base, (neuron_map, ROWS)):
        wanted = base.generate(**batch(), **options)
    assert torch.equal(model.generate(**batch(), strengths=ROWS, **options), wanted)


@each_kind
def test_a_base_model_that_transformers_quantized_is_edited_like_plain_hooks_on_it(kind: str, tmp_path: Any) -> None:
    tiny_model().save_pretrained(tmp_path / "base")

    def load() -> PreTrainedModel:
        config = TorchAoConfig(Int8WeightOnlyConfig(version=2))
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, dtype=torch.float32)

    base = load()
    neuron_map = random_map(base, **KINDS[kind])
    neuron_map.save_pretrained(tmp_path / "map")
    for model in (
        NeVAModel.from_pretrained(load(), tmp_path / "map"),
        PeftModel.from_pretrained(load(), str(tmp_path / "map")),
    ):
        with edited(base, (neuron_map, ROWS)):
            torch.testing.assert_close(logits(model, strengths=ROWS), logits(base), atol=1e-4, rtol=1e-4)
        assert_same_bits(logits(model), logits(base))


def test_edits_cannot_be_merged_into_quantized_weights_but_can_be_taken_off() -> None:
    base = quantized()
    model = random_map(base).apply_to(quantized())
    model.set_strengths(ROWS[0])
    with pytest.raises(NeVAError, match="without a plain floating-point weight.*without quantization to merge"):
        model.merge_and_unload()
    assert_same_bits(logits(model.unload()), logits(base))


def test_nothing_is_merged_into_quantized_weights_at_strength_zero() -> None:
    base = quantized()
    model = random_map(base).apply_to(quantized())
    assert_same_bits(logits(model.merge_and_unload()), logits(base))


# Layers that are no plain nn.Linear.


class Doubled(nn.Linear):
    """A linear map whose weight alone does not tell what it does, as with scaled or packed weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@each_kind
@each_strengths
def test_linear_layers_of_unknown_classes_are_measured_rather_than_read(kind: str, strengths: Any) -> None:
    def doubled() -> PreTrainedModel:
        model = tiny_model()
        for layer in model.model.layers:
            layer.mlp.down_proj.__class__ = Doubled
        return model

    base = doubled()
    neuron_map = random_map(base, **KINDS[kind])
    model = neuron_map.apply_to(doubled())
    with edited(base, (neuron_map, strengths)):
        assert_near(logits(model, strengths=strengths), logits(base))


@each_kind
def test_hooks_on_the_base_layer_still_run(kind: str) -> None:
    _, model, _ = tiny_pair(**KINDS[kind])
    seen: list[int] = []
    neva_layers(model)[0].base_layer.register_forward_hook(lambda *_: seen.append(1))
    logits(model, strengths=ROWS[0])
    model.set_strengths(ROWS[0])
    logits(model)
    assert len(seen) >= 2


def test_a_map_on_more_values_than_are_dialled_costs_no_dense_copy() -> None:
    # The general path gathers k inputs; it never makes another [batch, tokens, d_ff].
    model = get_peft_model(tiny_model(), NeVAConfig(values=["power"], neurons=2, use_gain=True))
    layer = neva_layers(model)[0]
    x = torch.randn(1, 4, layer.in_features)
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.data_ptr() != x.data_ptr():
                sizes.append(result.numel())
            return result

    with torch.no_grad(), model.base_model.strengths(power=1.0), Sizes():
        layer(x)
    assert sizes
    assert max(size for size in sizes if size != layer.base_layer.weight.numel()) < x.numel()
