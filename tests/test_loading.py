"""Every way of loading, saving, switching, merging and unloading a neuron map gives the same edit, to the bit."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from test_bit_identical import assert_same_bits
from test_edit_against_reference import KINDS, assert_near
from tiny import ARCHITECTURES, add_map, batch, random_map, tiny_model, tiny_pair, tiny_reader, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel, pipeline

import neva_hf
from neva_hf import NeuronMap, NeVAConfig, NeVAError, NeVAModel

DIAL = {"benevolence": 1.0, "power": -0.5}
DEFAULTS = {"power": 1.5}
PROMPT = "the hen"
PROMPT_IDS = torch.tensor([tiny_tokenizer()(PROMPT)["input_ids"]])

each_kind = pytest.mark.parametrize("kind", KINDS)


@dataclass(frozen=True)
class Saved:
    """A tiny base model and a map of it, on disk and in memory."""

    base: Path
    map: Path
    neuron_map: NeuronMap

    def load_base(self, **kwargs: Any) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.base, **kwargs)


def save(folder: Path, architecture: str = "llama", **map_options: Any) -> Saved:
    base = tiny_reader(architecture)
    base.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    neuron_map = random_map(base, base_model_name_or_path=str(folder / "base"), **map_options)
    neuron_map.save_pretrained(folder / "map")
    return Saved(folder / "base", folder / "map", neuron_map)


@pytest.fixture(params=KINDS)
def saved(tmp_path: Path, request: pytest.FixtureRequest) -> Saved:
    return save(tmp_path, **KINDS[request.param])


def by_get_peft_model(saved: Saved) -> Any:
    model = get_peft_model(saved.load_base(), NeuronMap.from_pretrained(saved.map).config)
    set_peft_model_state_dict(model, load_file(saved.map / "adapter_model.safetensors"))
    return model


def by_transformers(saved: Saved, **kwargs: Any) -> Any:
    model = saved.load_base()
    model.load_adapter(str(saved.map), **kwargs)
    return model


WAYS: dict[str, Callable[[Saved], Any]] = {
    "get_peft_model": by_get_peft_model,
    "PeftModel.from_pretrained": lambda saved: PeftModel.from_pretrained(saved.load_base(), str(saved.map)),
    "PeftModel, low_cpu_mem_usage": lambda saved: PeftModel.from_pretrained(
        saved.load_base(), str(saved.map), low_cpu_mem_usage=True
    ),
    "AutoPeftModel": lambda saved: AutoPeftModelForCausalLM.from_pretrained(str(saved.map)),
    "transformers load_adapter": by_transformers,
    "transformers from adapter folder": lambda saved: AutoModelForCausalLM.from_pretrained(str(saved.map)),
    "NeVAModel of base and folder": lambda saved: NeVAModel.from_pretrained(saved.load_base(), saved.map),
    "NeVAModel of base and map": lambda saved: NeVAModel.from_pretrained(saved.load_base(), saved.neuron_map),
    "NeVAModel of the map alone": lambda saved: NeVAModel.from_pretrained(saved.map),
    "NeVAModel.from_map": lambda saved: NeVAModel.from_map(saved.load_base(), saved.neuron_map),
    "NeuronMap.apply_to": lambda saved: saved.neuron_map.apply_to(saved.load_base()),
}

each_way = pytest.mark.parametrize("load", WAYS.values(), ids=WAYS)


def logits(model: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(), **kwargs).logits


def edited_logits(saved: Saved, dial: dict[str, float] = DIAL) -> torch.Tensor:
    """What the other ways are held to (and what test_edit_against_reference.py holds to the reference)."""
    return logits(NeVAModel.from_map(saved.load_base(), saved.neuron_map), strengths=dial)


def adapter_tensors(model: Any) -> dict[str, torch.Tensor]:
    return NeuronMap.from_model(model).state_dict()


# Loading.


@each_way
def test_a_loaded_map_is_the_saved_one_to_the_bit(load: Callable[[Saved], Any], saved: Saved) -> None:
    found, wanted = adapter_tensors(load(saved)), saved.neuron_map.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@each_way
def test_a_loaded_map_changes_nothing_until_it_is_dialled(load: Callable[[Saved], Any], saved: Saved) -> None:
    model = load(saved)
    assert_same_bits(logits(model), logits(saved.load_base()))
    neva_hf.set_strengths(model, DIAL)
    assert_same_bits(logits(model), edited_logits(saved))
    neva_hf.set_strengths(model)
    assert_same_bits(logits(model), logits(saved.load_base()))


@each_way
def test_a_loaded_map_can_be_dialled_in_a_context(load: Callable[[Saved], Any], saved: Saved) -> None:
    model = load(saved)
    rows = [DIAL, {}, {"security": 1.0}]
    wanted = logits(NeVAModel.from_map(saved.load_base(), saved.neuron_map), strengths=rows)
    with neva_hf.dialled(model, rows):
        assert_same_bits(logits(model), wanted)
    assert_same_bits(logits(model), logits(saved.load_base()))


@each_way
def test_default_strengths_are_in_force_after_loading(load: Callable[[Saved], Any], tmp_path: Path) -> None:
    saved = save(tmp_path, gain=True, default_strengths=DEFAULTS)
    model = load(saved)
    assert_same_bits(logits(model), edited_logits(saved, DEFAULTS))
    assert neva_hf.get_strengths(model) == {"benevolence": 0.0, "power": 1.5, "security": 0.0}
    with neva_hf.dialled(model, {}):
        assert_same_bits(logits(model), logits(saved.load_base()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_loads_by_peft_and_by_transformers(architecture: str, tmp_path: Path) -> None:
    saved = save(tmp_path, architecture, gain=True, gate=True, default_strengths=DEFAULTS)
    wanted = edited_logits(saved, DEFAULTS)
    for way in ("PeftModel.from_pretrained", "transformers from adapter folder", "NeVAModel of the map alone"):
        assert_same_bits(logits(WAYS[way](saved)), wanted)


def test_the_map_alone_brings_its_base_model_and_tokenizer(tmp_path: Path) -> None:
    saved = save(tmp_path)
    model = NeVAModel.from_pretrained(saved.map, dtype=torch.bfloat16)
    assert model.tokenizer is not None
    assert model.tokenizer("hen")["input_ids"] == tiny_tokenizer()("hen")["input_ids"]
    assert model.dtype == torch.bfloat16
    assert not model.training


def test_a_map_in_a_subfolder_is_found(tmp_path: Path) -> None:
    saved = save(tmp_path)
    model = NeVAModel.from_pretrained(saved.load_base(), tmp_path, subfolder="map")
    assert_same_bits(logits(model, strengths=DIAL), edited_logits(saved))


def test_a_model_of_more_than_twenty_layers_keeps_every_layer_apart(tmp_path: Path) -> None:
    # PEFT shortens long lists of target modules to common endings.
    base = tiny_model(num_hidden_layers=24, layer_types=["full_attention"] * 24)
    neuron_map = random_map(base, size=0.1)
    neuron_map.modules = dict(list(neuron_map.modules.items())[3:23])
    neuron_map = NeuronMap(neuron_map.config, neuron_map.modules)
    neuron_map.save_pretrained(tmp_path)
    wanted = logits(neuron_map.apply_to(copy.deepcopy(base)), strengths=DIAL)
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    assert len(neva_hf.dial.neva_layers(model)) == 20
    assert_same_bits(logits(model, strengths=DIAL), wanted)


def test_the_base_model_that_was_given_keeps_its_bits_and_its_flags(tmp_path: Path) -> None:
    # torch picks other kernels for frozen weights, and their last bits differ.
    saved = save(tmp_path)
    for way in ("PeftModel.from_pretrained", "NeVAModel of base and folder", "AutoPeftModel"):
        base, model = saved.load_base(), WAYS[way](saved)
        for (_, wanted), (_, found) in zip(base.named_parameters(), model.unload().named_parameters(), strict=True):
            assert torch.equal(found, wanted)
            assert found.requires_grad == wanted.requires_grad


def test_an_adapter_made_by_hand_is_the_identity_and_freezes_the_base(tmp_path: Path) -> None:
    base = tiny_model()
    model = get_peft_model(tiny_model(), NeVAConfig(values=["power", "security"], neurons=4, use_gain=True))
    assert_same_bits(logits(model, strengths={"power": 3.0}), logits(base))
    assert all(not parameter.requires_grad for name, parameter in model.named_parameters() if "neva_" not in name)
    model.save_pretrained(tmp_path)
    for loaded in (
        PeftModel.from_pretrained(tiny_model(), str(tmp_path)),
        NeVAModel.from_pretrained(tiny_model(), tmp_path),
    ):
        assert_same_bits(logits(loaded, strengths={"power": 3.0}), logits(base))
        assert NeuronMap.from_model(loaded).values == ["power", "security"]


# Saving.


@each_way
def test_what_any_way_loads_can_be_saved_and_loaded_again(
    load: Callable[[Saved], Any], saved: Saved, tmp_path: Path
) -> None:
    load(saved).save_pretrained(tmp_path / "again")
    again = NeuronMap.from_pretrained(tmp_path / "again")
    for name, tensor in saved.neuron_map.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert again.values == saved.neuron_map.values


def test_peft_writes_the_same_files_as_the_map(tmp_path: Path) -> None:
    saved = save(tmp_path, gain=True, gate=True, units={"power": [0.5, 2.0]}, ranges={"power": [-3.0, 4.0]})
    NeVAModel.from_pretrained(saved.load_base(), saved.map).save_pretrained(tmp_path / "again")
    first, again = (load_file(folder / "adapter_model.safetensors") for folder in (saved.map, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (saved.map, tmp_path / "again")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("when", ["base in low precision", "model cast later"])
@pytest.mark.parametrize(
    "way", ["PeftModel.from_pretrained", "transformers load_adapter", "NeVAModel of base and map"]
)
def test_maps_stay_float32_to_the_bit_in_models_of_lower_precision(
    way: str, when: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    saved = save(tmp_path, gain=True, gate=True)
    if when == "base in low precision":
        saved.load_base(dtype=dtype).save_pretrained(saved.base)
        model = WAYS[way](saved)
    else:
        model = WAYS[way](saved).to(dtype)
    assert model.dtype == dtype
    model.save_pretrained(tmp_path / "again")
    for name, tensor in NeuronMap.from_pretrained(tmp_path / "again").state_dict().items():
        assert torch.equal(tensor, saved.neuron_map.state_dict()[name]), name


def test_the_config_survives_the_round_trip(tmp_path: Path) -> None:
    saved = save(
        tmp_path,
        gain=True,
        units={"power": [0.5, 2.0]},
        ranges={"power": [-3.0, 4.0]},
        default_strengths=DEFAULTS,
        provenance={"method": "random", "versions": {"torch": "2"}},
        measurements={"kl": {"power": {"+1": 0.05}}},
        value_system={"name": "three"},
    )
    config = PeftConfig.from_pretrained(str(saved.map))
    assert isinstance(config, NeVAConfig)
    for field in (
        "values",
        "units",
        "ranges",
        "default_strengths",
        "provenance",
        "measurements",
        "value_system",
        "base",
    ):
        assert getattr(config, field) == getattr(saved.neuron_map.config, field)
    assert config.neurons == dict.fromkeys(saved.neuron_map.modules, 6)


# Several adapters.


def two_adapters() -> tuple[PreTrainedModel, NeVAModel]:
    base, model, _ = tiny_pair()
    add_map(model, random_map(base, ["power", "hedonism"], seed=8, gain=True), "second")
    return base, model


def test_set_adapter_chooses_whose_values_are_dialled() -> None:
    base, model = two_adapters()
    alone = random_map(base, ["power", "hedonism"], seed=8, gain=True).apply_to(tiny_model())
    assert model.values == ["benevolence", "power", "security"]
    first = logits(model, strengths={"power": 1.0})
    model.set_adapter("second")
    assert model.values == ["power", "hedonism"]
    assert_same_bits(logits(model, strengths={"power": 1.0}), logits(alone, strengths={"power": 1.0}))
    with pytest.raises(NeVAError, match="This map has no value 'benevolence'"):
        model.set_strengths(benevolence=1.0)
    model.set_adapter("default")
    assert_same_bits(logits(model, strengths={"power": 1.0}), first)


def test_each_adapter_keeps_its_own_strengths() -> None:
    base, model = two_adapters()
    model.set_strengths(power=1.0)
    first = logits(model)
    model.set_adapter("second")
    assert_same_bits(logits(model), logits(base))
    model.set_strengths(hedonism=1.0)
    assert model.get_strengths() == {"power": 0.0, "hedonism": 1.0}
    model.set_adapter("default")
    assert model.get_strengths() == {"benevolence": 0.0, "power": 1.0, "security": 0.0}
    assert_same_bits(logits(model), first)


@pytest.mark.parametrize("difference", [{"gate_probability": 0.6}, {"units": {"power": [3.0, 3.0]}}, {"seed": 5}])
def test_switching_between_maps_of_one_shape_leaves_nothing_of_the_other(difference: dict[str, Any]) -> None:
    base, model, first = tiny_pair(gate=True)
    second = random_map(base, gate=True, **difference)
    add_map(model, second, "second")
    alone = {
        name: logits(one.apply_to(tiny_model()), strengths={"power": 1.0})
        for name, one in (("default", first), ("second", second))
    }
    assert not torch.equal(alone["default"], alone["second"])
    for name in ("default", "second", "default", "second"):
        model.set_adapter(name)
        model.set_strengths(power=1.0)
        assert_same_bits(logits(model), alone[name])
        assert_same_bits(logits(model, strengths={"power": 1.0}), alone[name])


def test_a_deleted_adapter_leaves_no_edit() -> None:
    base, model = two_adapters()
    model.set_strengths(power=1.0)
    first = logits(model)
    model.delete_adapter("second")
    assert_same_bits(logits(model), first)
    with pytest.warns(UserWarning, match="Adapter second was active"):
        add_map(model, random_map(base, ["security"], seed=9), "second")
        model.set_adapter("second")
        model.set_strengths(security=2.0)
        model.delete_adapter("second")
    assert_same_bits(logits(model), first)


def test_an_adapter_name_can_be_used_again_after_it_was_deleted() -> None:
    base, model = two_adapters()
    replacement = random_map(base, ["power", "hedonism"], seed=21, gain=True)
    model.delete_adapter("second")
    add_map(model, replacement, "second")
    model.set_adapter("second")
    wanted = logits(replacement.apply_to(tiny_model()), strengths={"power": 1.0})
    assert_same_bits(logits(model, strengths={"power": 1.0}), wanted)


def test_deleting_the_last_adapter_leaves_the_base_model() -> None:
    base, model, _ = tiny_pair(default_strengths=DEFAULTS)
    model.base_model.delete_adapter("default")
    with torch.no_grad():
        assert_same_bits(model.base_model.model(**batch()).logits, logits(base))


def test_transformers_switches_and_deletes_adapters_too(tmp_path: Path) -> None:
    saved = save(tmp_path, default_strengths=DEFAULTS)
    other = random_map(saved.load_base(), ["hedonism"], seed=4, default_strengths={"hedonism": 2.0})
    other.save_pretrained(tmp_path / "other")
    model = by_transformers(saved, adapter_name="first")
    model.load_adapter(str(tmp_path / "other"), adapter_name="other")
    model.set_adapter("first")
    assert_same_bits(logits(model), edited_logits(saved, DEFAULTS))
    model.set_adapter("other")
    wanted = logits(other.apply_to(saved.load_base()))
    assert_same_bits(logits(model), wanted)
    model.disable_adapters()
    assert_same_bits(logits(model), logits(saved.load_base()))
    model.enable_adapters()
    assert_same_bits(logits(model), wanted)
    model.delete_adapter("first")
    assert_same_bits(logits(model), wanted)
    model.delete_adapter("other")
    assert_same_bits(logits(model), logits(saved.load_base()))


@pytest.mark.parametrize("name", ["a", "weight", "my map"])
def test_any_adapter_name_that_transformers_takes_leaves_the_base_weights_alone(name: str, tmp_path: Path) -> None:
    saved = save(tmp_path)
    model = by_transformers(saved, adapter_name=name)
    assert_same_bits(logits(model), logits(saved.load_base()))
    neva_hf.set_strengths(model, DIAL)
    assert_same_bits(logits(model), edited_logits(saved))


def test_maps_on_different_modules_are_dialled_together() -> None:
    base = tiny_model()
    whole = random_map(base)
    names = list(whole.modules)
    halves = [NeuronMap(whole.config, {name: whole.modules[name]}) for name in names]
    model = halves[0].apply_to(tiny_model())
    add_map(model, halves[1], "second")
    model.base_model.set_adapter(["default", "second"])
    assert_same_bits(logits(model, strengths=DIAL), logits(whole.apply_to(tiny_model()), strengths=DIAL))
    model.set_strengths(DIAL)
    assert_same_bits(logits(model), logits(whole.apply_to(tiny_model()), strengths=DIAL))


# Merging.

merging_is_in_memory = pytest.mark.filterwarnings("ignore:The base model's down projections have no bias")


@merging_is_in_memory
@pytest.mark.parametrize("kind", ["folded", "gain"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_merged_model_has_the_edited_logits(architecture: str, kind: str) -> None:
    base, model, _ = tiny_pair(architecture, units={"power": [0.5, 2.0]}, **KINDS[kind])
    model.set_strengths(DIAL)
    wanted = logits(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is type(base)
    assert not neva_hf.dial.neva_layers(merged)
    assert_near(logits(merged), wanted)


@merging_is_in_memory
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_merging_several_adapters_with_gains_on_the_same_neurons_gives_their_edited_logits(architecture: str) -> None:
    base, model, _ = tiny_pair(architecture, neurons=40, gain=True)
    add_map(model, random_map(base, ["hedonism"], neurons=40, gain=True, seed=8), "second")
    model.base_model.set_adapter(["default", "second"])
    dial = {"power": 1.0, "hedonism": -1.0}
    model.set_strengths(dial)
    wanted = logits(model)
    before = logits(base)
    model.merge_adapter()
    assert_near(logits(model), wanted)
    model.unmerge_adapter()
    assert_same_bits(logits(model, strengths={}), before)
    model.merge_adapter(["second"])
    with pytest.warns(UserWarning, match="additionally merging default"):
        model.merge_adapter(["default"])
    assert_near(logits(model), wanted)
    assert_near(logits(model.merge_and_unload()), wanted)


@merging_is_in_memory
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("kind", ["folded", "gain"])
def test_unmerging_restores_every_bit(architecture: str, kind: str) -> None:
    base, model, _ = tiny_pair(architecture, **KINDS[kind])
    model.set_strengths(DIAL)
    edited = logits(model)
    for _ in range(2):
        model.merge_adapter()
        assert_near(logits(model), edited)
        model.unmerge_adapter()
        assert_same_bits(logits(model), edited)
    weights = model.unload().state_dict()
    assert weights.keys() == base.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in base.state_dict().items())


@merging_is_in_memory
def test_a_model_that_was_cast_while_merged_unmerges_in_its_new_dtype() -> None:
    base, model, _ = tiny_pair(gain=True)
    model.set_strengths(DIAL)
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert_same_bits(logits(model, strengths={}), logits(base.to(torch.bfloat16)))


@merging_is_in_memory
def test_disabling_a_merged_adapter_gives_the_base_model() -> None:
    base, model, _ = tiny_pair()
    model.set_strengths(DIAL)
    edited = logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert_same_bits(logits(model), logits(base))
    assert_same_bits(logits(model), edited)


@merging_is_in_memory
def test_dialling_a_merged_model_is_refused_rather_than_ignored() -> None:
    _, model, _ = tiny_pair()
    model.set_strengths(DIAL)
    model.merge_adapter()
    for dial in (
        lambda: model.set_strengths(power=1.0),
        lambda: logits(model, strengths={"power": 1.0}),
        lambda: model.generate(**batch(), strengths={"power": 1.0}),
    ):
        with pytest.raises(NeVAError, match=r"merged into the base model's weights.*unmerge_adapter"):
            dial()
    model.unmerge_adapter()
    model.set_strengths(power=1.0)


def test_merging_says_that_most_architectures_drop_the_bias() -> None:
    _, model, _ = tiny_pair()
    model.set_strengths(DIAL)
    with pytest.warns(UserWarning, match="drop it when the merged model is saved"):
        model.merge_and_unload()


@merging_is_in_memory
def test_gates_cannot_be_merged_and_the_model_is_left_alone() -> None:
    base, model, _ = tiny_pair(gate=True)
    model.set_strengths(DIAL)
    with pytest.raises(NeVAError, match="has gates, which decide per token"):
        model.merge_adapter()
    model.set_strengths({})
    assert_same_bits(logits(model), logits(base))


@merging_is_in_memory
def test_a_safe_merge_refuses_numbers_that_are_not_finite() -> None:
    _, model, _ = tiny_pair()
    model.set_strengths(DIAL)
    with torch.no_grad():
        model.base_model.model.model.layers[0].mlp.down_proj.base_layer.weight.fill_(float("inf"))
    with pytest.raises(NeVAError, match="numbers that are not finite"):
        model.merge_adapter(safe_merge=True)


# Around the model.


TEXT: dict[str, Any] = {"max_new_tokens": 8, "return_tensors": True, "do_sample": False}
STRONG = {"benevolence": 10.0, "power": -10.0}


def test_a_pipeline_takes_strengths(tmp_path: Path) -> None:
    saved = save(tmp_path, gain=True)
    model = NeVAModel.from_pretrained(saved.map)
    base = pipeline("text-generation", model=saved.load_base(), tokenizer=model.tokenizer)
    pipe = pipeline("text-generation", model=model, tokenizer=model.tokenizer)
    plain = base(PROMPT, **TEXT)[0]["generated_token_ids"]
    wanted = model.generate(PROMPT_IDS, strengths=STRONG, max_new_tokens=8)[0].tolist()
    assert wanted != plain
    assert pipe(PROMPT, **TEXT)[0]["generated_token_ids"] == plain
    assert pipe(PROMPT, strengths=STRONG, **TEXT)[0]["generated_token_ids"] == wanted
    model.set_strengths(STRONG)
    assert pipe(PROMPT, **TEXT)[0]["generated_token_ids"] == wanted


def test_a_pipeline_of_a_model_that_transformers_loaded_takes_a_context(tmp_path: Path) -> None:
    saved = save(tmp_path, gain=True)
    pipe = pipeline("text-generation", model=str(saved.map), tokenizer=tiny_tokenizer())
    with neva_hf.dialled(pipe.model, STRONG):
        got = pipe(PROMPT, **TEXT)[0]["generated_token_ids"]
    model = NeVAModel.from_pretrained(saved.map)
    assert got == model.generate(PROMPT_IDS, strengths=STRONG, max_new_tokens=8)[0].tolist()
    assert got != pipe(PROMPT, **TEXT)[0]["generated_token_ids"]


def test_a_deep_copy_is_dialled_and_saved_like_the_original(tmp_path: Path) -> None:
    saved = save(tmp_path, gain=True, default_strengths=DEFAULTS)
    model = NeVAModel.from_pretrained(saved.map)
    twin = copy.deepcopy(model)
    assert_same_bits(logits(twin), logits(model))
    assert_same_bits(logits(twin, strengths=DIAL), edited_logits(saved))
    twin.save_pretrained(tmp_path / "twin")
    assert NeuronMap.from_pretrained(tmp_path / "twin").values == saved.neuron_map.values


def test_the_adapter_state_dict_holds_nothing_but_the_map() -> None:
    _, model, neuron_map = tiny_pair(gain=True, gate=True)
    found, wanted = get_peft_model_state_dict(model), neuron_map.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_loading_other_numbers_into_a_dialled_model_is_seen_at_once() -> None:
    base, model, _ = tiny_pair()
    model.set_strengths(DIAL)
    other = random_map(base, seed=77)
    set_peft_model_state_dict(model, other.state_dict())
    assert_same_bits(logits(model), logits(other.apply_to(tiny_model()), strengths=DIAL))
    assert_same_bits(
        logits(model, strengths={"power": 1.0}), logits(other.apply_to(tiny_model()), strengths={"power": 1.0})
    )


def test_using_a_map_leaves_the_map_as_it_was() -> None:
    base = tiny_model()
    neuron_map = random_map(base, units={"power": [1.0, 1.0]})
    wanted = copy.deepcopy(neuron_map)
    model = neuron_map.apply_to(base)
    model.set_strengths(DIAL)
    model.peft_config["default"].units["power"][1] = 9.0
    for layer in neva_hf.dial.neva_layers(model):
        torch.nn.init.zeros_(layer.neva_shift["default"])
    assert neuron_map.config.units == wanted.config.units
    assert all(torch.equal(tensor, wanted.state_dict()[name]) for name, tensor in neuron_map.state_dict().items())


LOAD_IN_A_FRESH_PROCESS = """
import sys, torch
{line}
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
PeftModel.from_pretrained(base, sys.argv[2])
"""


def test_a_fresh_process_loads_maps_only_after_importing_neva_hf(tmp_path: Path) -> None:
    saved = save(tmp_path)
    without, with_import = (
        subprocess.run(
            [sys.executable, "-c", LOAD_IN_A_FRESH_PROCESS.format(line=line), str(saved.base), str(saved.map)],
            capture_output=True,
            text=True,
            check=False,
        )
        for line in ("", "import neva_hf")
    )
    assert without.returncode == 1
    assert without.stderr.rstrip().endswith("KeyError: 'NEVA'")
    assert with_import.returncode == 0, with_import.stderr
