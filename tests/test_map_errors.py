"""Maps may come from strangers. Whatever is wrong with one, the answer is a NeVAError that says what to do."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_bit_identical import assert_same_bits
from tiny import D_FF, batch, random_map, tiny_mixture, tiny_model, tiny_pair
from torch import nn

import neva_hf
from neva_hf import NeuronMap, NeVAConfig, NeVAError, NeVAModel
from neva_hf.neuron_map import ModuleEdits

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FIRST = "base_model.model.model.layers.0.mlp.down_proj."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return random_map(tiny_model(), gain=True, gate=True).save_pretrained(tmp_path / "map")


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def load_map(folder: Path) -> Any:
    return NeuronMap.from_pretrained(folder)


def load_model(folder: Path) -> Any:
    return NeVAModel.from_pretrained(tiny_model(), folder)


each_loader = pytest.mark.parametrize("load", [load_map, load_model])


def edits(**changes: Any) -> ModuleEdits:
    return ModuleEdits(**({"index": torch.arange(2, dtype=torch.int32), "shift": torch.ones(1, 2)} | changes))


# Maps for other models.

OTHERS = {
    "hidden_size": ({"hidden_size": 64}, "hidden_size is 64, the map needs 32"),
    "intermediate_size": ({"intermediate_size": 128}, "intermediate_size is 128, the map needs 64"),
    "num_hidden_layers": ({"num_hidden_layers": 3}, "num_hidden_layers is 3, the map needs 2"),
}
LOADERS: dict[str, Callable[[Any, NeuronMap, Path], Any]] = {
    "NeVAModel.from_pretrained": lambda base, _, folder: NeVAModel.from_pretrained(base, folder),
    "PeftModel.from_pretrained": lambda base, _, folder: PeftModel.from_pretrained(base, str(folder)),
    "transformers": lambda base, _, folder: base.load_adapter(str(folder)),
    "apply_to": lambda base, neuron_map, _: neuron_map.apply_to(base),
}


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("loader", LOADERS)
def test_a_map_for_a_model_of_another_shape_is_refused(loader: str, what: str, tmp_path: Path) -> None:
    overrides, message = OTHERS[what]
    if what == "num_hidden_layers":
        overrides = {**overrides, "layer_types": ["full_attention"] * 3}
    neuron_map = random_map(tiny_model())
    neuron_map.save_pretrained(tmp_path)
    base = tiny_model(**overrides)
    before = base.state_dict()
    with pytest.raises(
        NeVAError, match=rf"made for another model \(llama\): in LlamaForCausalLM, {message}\. Load the"
    ):
        LOADERS[loader](base, neuron_map, tmp_path)
    assert not neva_hf.dial.neva_layers(base)
    assert base.state_dict().keys() == before.keys()


@pytest.mark.parametrize("loader", LOADERS)
def test_a_map_for_modules_of_other_names_is_refused(loader: str, tmp_path: Path) -> None:
    neuron_map = random_map(tiny_model("gpt_neox"))
    neuron_map.save_pretrained(tmp_path)
    base = tiny_model()
    with pytest.raises(
        NeVAError,
        match=r"another model: it edits 'gpt_neox\.layers\.0\.mlp\.dense_4h_to_h' and 1 more modules, which "
        r"LlamaForCausalLM does not have \(it has, for example, 'model\.layers\.0\.mlp\.down_proj'\)",
    ):
        LOADERS[loader](base, neuron_map, tmp_path)
    assert not neva_hf.dial.neva_layers(base)


def test_every_difference_is_named_at_once() -> None:
    neuron_map = random_map(tiny_model())
    with pytest.raises(
        NeVAError, match="hidden_size is 64, the map needs 32; intermediate_size is 128, the map needs 64"
    ):
        neuron_map.apply_to(tiny_model(hidden_size=64, intermediate_size=128, head_dim=16))


@pytest.mark.parametrize("loader", LOADERS)
def test_neurons_beyond_the_width_of_the_model_are_refused(loader: str, tmp_path: Path) -> None:
    # Without a `base` in the config only the numbers themselves can tell.
    neuron_map = random_map(tiny_model(), base=None)
    neuron_map.modules["model.layers.1.mlp.down_proj"].index[2] = D_FF
    neuron_map.save_pretrained(tmp_path)
    base = tiny_model()
    with pytest.raises(
        NeVAError, match=rf"edits neuron {D_FF} of 'model\.layers\.1\.mlp\.down_proj', which has only {D_FF}"
    ):
        loaded = LOADERS[loader](base, neuron_map, tmp_path)
        # (PEFT and transformers copy what is in the file; it is looked at when it is used.)
        neva_hf.set_strengths(base if loader == "transformers" else loaded, {"power": 1.0})


def test_a_refused_map_leaves_the_base_model_usable() -> None:
    base, wanted, neuron_map = tiny_pair()
    bad = random_map(base, base=None)
    bad.modules["model.layers.1.mlp.down_proj"].index[2] = D_FF
    with pytest.raises(NeVAError):
        bad.apply_to(base)
    with torch.no_grad():
        got = neuron_map.apply_to(base)(**batch(), strengths={"power": 1.0}).logits
        assert_same_bits(got, wanted(**batch(), strengths={"power": 1.0}).logits)


def test_a_second_map_on_the_same_model_says_how_to_add_it() -> None:
    base = tiny_model()
    neuron_map = random_map(base)
    model = neuron_map.apply_to(base)
    for again in (base, model):
        with pytest.raises(NeVAError, match=r"has a neuron map on it already: add another with model\.load_adapter"):
            neuron_map.apply_to(again)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("model.layers.0.mlp", r"LlamaMLP does not tell its numbers of input and output features"),
        ("model.embed_tokens", r"Embedding does not tell its numbers of input and output features"),
        ("model.layers.0.mlp.act_fn", r"does not tell its numbers of input and output features"),
        (
            "model.layers.7.mlp.down_proj",
            r"it edits 'model\.layers\.7\.mlp\.down_proj', which LlamaForCausalLM does not",
        ),
    ],
)
def test_maps_of_modules_that_cannot_be_edited_are_refused(module: str, message: str) -> None:
    neuron_map = NeuronMap(NeVAConfig(values=["power"]), {module: edits()})
    with pytest.raises(NeVAError, match=message):
        neuron_map.apply_to(tiny_model())


# Mixtures of experts.

EXPERTS = (
    r"'model\.layers\.0\.mlp\.experts' is a mixture of experts: it holds the weights of many experts in fused tensors "
    r"\(.*down_proj.*\), and which of their neurons run changes with every token, so there is no single down projection"
)


def test_a_mixture_of_experts_is_refused_by_name_and_with_the_reason() -> None:
    with pytest.raises(NeVAError, match=EXPERTS):
        get_peft_model(tiny_mixture(), NeVAConfig(values=["power"], neurons=2))


def test_experts_that_are_named_by_hand_are_refused_too() -> None:
    config = NeVAConfig(values=["power"], neurons=2, target_modules=["model.layers.0.mlp.experts"])
    with pytest.raises(NeVAError, match=EXPERTS):
        get_peft_model(tiny_mixture(), config)
    neuron_map = NeuronMap(NeVAConfig(values=["power"]), {"model.layers.0.mlp.experts": edits()})
    with pytest.raises(NeVAError, match=EXPERTS):
        neuron_map.apply_to(tiny_mixture())


def test_experts_in_a_list_are_refused_too() -> None:
    model = tiny_model()
    model.model.layers[1].mlp.experts = nn.ModuleList([nn.Linear(4, 4)])
    with pytest.raises(
        NeVAError, match=r"'model\.layers\.1\.mlp\.experts' is a mixture of experts: .* in a list, and"
    ):
        get_peft_model(model, NeVAConfig(values=["power"], neurons=2))


def test_dense_modules_of_a_mixture_can_be_named_by_hand() -> None:
    config = NeVAConfig(values=["power"], neurons=2, target_modules=["self_attn.o_proj"])
    model = get_peft_model(tiny_mixture(), config)
    assert len(neva_hf.dial.neva_layers(model)) == 2


# Missing and damaged files.


@each_loader
def test_a_folder_without_a_map_says_which_file_is_missing(load: Any, tmp_path: Path, folder: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(NeVAError, match=r"There is no neuron map in .*empty: adapter_config\.json is missing\."):
        load(empty)
    (folder / WEIGHTS).unlink()
    with pytest.raises(NeVAError, match=r"There is no neuron map in .*map: adapter_model\.safetensors is missing\."):
        load(folder)


@each_loader
def test_a_file_in_place_of_a_folder_is_refused(load: Any, folder: Path) -> None:
    with pytest.raises(
        NeVAError, match=r"is a file; give the folder of a neuron map, or the id of a Hub repository\."
    ):
        load(folder / WEIGHTS)


@each_loader
def test_a_path_that_is_not_there_and_no_repository_either_says_both(load: Any, tmp_path: Path) -> None:
    with pytest.raises(
        NeVAError, match=r"There is no folder .*no/such/place.*, and it cannot be the id of a Hub reposit"
    ):
        load(tmp_path / "no/such/place")


def test_a_repository_that_cannot_be_had_says_what_the_hub_said() -> None:
    with pytest.raises(
        NeVAError, match=r"No neuron map was found at someone/no-such-map: there is no such folder, and"
    ):
        NeuronMap.from_pretrained("someone/no-such-map", local_files_only=True)


@each_loader
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"adapter_config\.json is not valid JSON .*; the neuron map is damaged\."),
        ('{"peft_type": "NEVA"', r"adapter_config\.json is not valid JSON"),
        ("\x00\xff", r"adapter_config\.json is not valid JSON"),
        ("[" * 100_000, r"adapter_config\.json is not valid JSON"),
        ("[1, 2]", r"adapter_config\.json must hold a JSON object, got list\."),
        ('"NEVA"', r"adapter_config\.json must hold a JSON object, got str\."),
        ("{}", r"This is a PEFT adapter of the type None, not a neuron map"),
    ],
)
def test_a_damaged_config_is_refused(load: Any, folder: Path, text: str, message: str) -> None:
    (folder / CONFIG).write_text(text, encoding="latin-1")
    with pytest.raises(NeVAError, match=message):
        load(folder)


@each_loader
def test_a_huge_config_is_refused_unread(load: Any, folder: Path) -> None:
    with open(folder / CONFIG, "r+b") as file:
        file.truncate(17 * 2**20)
    with pytest.raises(NeVAError, match=r"adapter_config\.json is larger than 16 MiB"):
        load(folder)


@each_loader
def test_a_huge_weights_file_is_refused_unread(load: Any, folder: Path) -> None:
    with open(folder / WEIGHTS, "r+b") as file:
        file.truncate(2**30 + 1)
    with pytest.raises(NeVAError, match=r"adapter_model\.safetensors is larger than 1 GiB"):
        load(folder)


@each_loader
@pytest.mark.parametrize("damage", ["empty", "cut", "no header", "longer", "text"])
def test_damaged_weights_are_refused(load: Any, folder: Path, damage: str) -> None:
    content = (folder / WEIGHTS).read_bytes()
    damaged = {
        "empty": b"",
        "cut": content[: len(content) // 2],
        "no header": b"\xff" * 8 + content[8:],
        "longer": content + b"more",
        "text": b"version https://git-lfs.github.com/spec/v1\n",
    }
    (folder / WEIGHTS).write_bytes(damaged[damage])
    with pytest.raises(NeVAError, match=r"adapter_model\.safetensors is not a sound safetensors file .* is damaged\."):
        load(folder)


@each_loader
def test_a_lora_adapter_is_named_as_what_it_is(load: Any, tmp_path: Path) -> None:
    get_peft_model(tiny_model(), LoraConfig(target_modules=["down_proj"])).save_pretrained(tmp_path)
    with pytest.raises(
        NeVAError, match=r"This is a PEFT adapter of the type 'LORA', not a neuron map \('NEVA'\)\. Load it"
    ):
        load(tmp_path)


# Tensors.

TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "shift in float16": (
        lambda t: t.update({FIRST + "neva_shift": t[FIRST + "neva_shift"].half()}),
        r"neva_shift must be F32, got F16",
    ),
    "index in int64": (
        lambda t: t.update({FIRST + "neva_index": t[FIRST + "neva_index"].long()}),
        r"neva_index must be I32, got I64",
    ),
    "nan": (
        lambda t: t[FIRST + "neva_shift"].fill_(float("nan")),
        r"neva_shift of .* holds numbers that are not finite",
    ),
    "inf": (
        lambda t: t[FIRST + "neva_gain"].fill_(float("inf")),
        r"neva_gain of .* holds numbers that are not finite",
    ),
    "nan in the gate": (
        lambda t: t[FIRST + "neva_gate_bias"].fill_(float("nan")),
        r"neva_gate_bias of .* holds numbers that are not finite",
    ),
    "a neuron twice": (lambda t: t[FIRST + "neva_index"].fill_(3), r"neva_index of .* must name each neuron once"),
    "a negative neuron": (lambda t: t[FIRST + "neva_index"][:1].fill_(-1), r"by a number of at least 0"),
    "a neuron beyond": (
        lambda t: t[FIRST + "neva_index"][:1].fill_(D_FF),
        rf"neva_index of .* names neuron {D_FF}, but there are only {D_FF}\.",
    ),
    "no neurons": (
        lambda t: t.update({FIRST + "neva_index": torch.zeros(0, dtype=torch.int32)}),
        r"edits 0 neurons of .*, its config says 6: the two files are not of the same map",
    ),
    "a flat shift": (
        lambda t: t.update({FIRST + "neva_shift": t[FIRST + "neva_shift"].flatten()}),
        r"neva_shift of .* must be float32 \[3, 6\], got float32 \[18\]",
    ),
    "a gate of other values": (
        lambda t: t.update({FIRST + "neva_gate_bias": torch.zeros(4)}),
        r"neva_gate_bias of .* must be float32 \[3\], got float32 \[4\]",
    ),
    "no index": (lambda t: t.pop(FIRST + "neva_index"), r"has no neva_index for 'model\.layers\.0.*; it is damaged"),
    "no shift": (lambda t: t.pop(FIRST + "neva_shift"), r"has no neva_shift for 'model\.layers\.0.*; it is damaged"),
    "no gain": (lambda t: t.pop(FIRST + "neva_gain"), r"do not fit use_gain=True and use_gate=True of the config"),
    "half a gate": (lambda t: t.pop(FIRST + "neva_gate_bias"), r"do not fit use_gain=True and use_gate=True"),
    "something else": (
        lambda t: t.update({FIRST + "lora_A.weight": torch.zeros(1)}),
        r"holds 'base_model.*lora_A\.weight', which is no tensor of a neuron map",
    ),
    "another prefix": (
        lambda t: t.update({"model.layers.0.neva_shift": torch.zeros(3, 6)}),
        r"holds 'model\.layers\.0\.neva_shift', which is no tensor of a neuron map",
    ),
    "a module without a name": (
        lambda t: t.update({"base_model.model..neva_shift": torch.zeros(3, 6)}),
        r"has no neva_index for ''; it is damaged",
    ),
    "a module less": (
        lambda t: [t.pop(name) for name in list(t) if name.startswith(FIRST)],
        r"edits other modules than its config says: they are not of the same map",
    ),
    "nothing": (lambda t: t.clear(), r"edits other modules than its config says"),
}


@each_loader
@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_cannot_be_used_are_refused(load: Any, folder: Path, what: str) -> None:
    change, message = TENSORS[what]
    change_tensors(folder, change)
    with pytest.raises(NeVAError, match=message):
        load(folder)


def test_tensors_that_the_config_does_not_announce_are_refused(folder: Path) -> None:
    change_config(folder, use_gain=False)
    with pytest.raises(NeVAError, match="do not fit use_gain=False and use_gate=True of the config"):
        load_map(folder)


def test_the_weights_of_another_map_are_refused(folder: Path, tmp_path: Path) -> None:
    other = random_map(tiny_model(), gain=True, gate=True, neurons=5).save_pretrained(tmp_path / "other")
    (other / WEIGHTS).replace(folder / WEIGHTS)
    with pytest.raises(NeVAError, match="edits 5 neurons of 'model.layers.0.mlp.down_proj', its config says 6"):
        load_map(folder)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({}, "needs at least one edited module"),
        ({"": edits()}, "each needs a name"),
        ({"a": edits(index=torch.zeros(0, dtype=torch.int32))}, r"must be a list of int32, got int32 \[0\]"),
        ({"a": edits(index=torch.arange(2))}, r"must be a list of int32, got int64 \[2\]"),
    ],
)
def test_maps_that_are_made_in_memory_are_checked_too(modules: dict[str, ModuleEdits], message: str) -> None:
    with pytest.raises(NeVAError, match=message):
        NeuronMap(NeVAConfig(values=["power"]), modules)


# Config fields.

FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "values, none": ({"values": []}, r"`values` must hold 1 to 256 names, got 0"),
    "values, a text": ({"values": "power"}, r"`values` must be a list of names"),
    "values, twice": ({"values": ["power", "power"]}, r"these stand more often: \['power'\]"),
    "values, a space": (
        {"values": ["self direction"]},
        r"'self direction' cannot be the name of a value: use lower-case",
    ),
    "values, upper case": ({"values": ["Power"]}, r"'Power' cannot be the name of a value"),
    "values, a line end": ({"values": ["power\n"]}, r"cannot be the name of a value"),
    "values, reserved": ({"values": ["gate"]}, r"'gate' cannot be the name of a value"),
    "values, a number": ({"values": [1]}, r"1 cannot be the name of a value"),
    "neurons, 0": ({"neurons": 0}, r"`neurons` must be a positive whole number .*, got 0"),
    "neurons, a bool": ({"neurons": True}, r"`neurons` must be a positive whole number .*, got True"),
    "neurons, a fraction": ({"neurons": {"a": 1.5}}, r"`neurons` must be a positive whole number .*, got 1\.5"),
    "neurons, too many": ({"neurons": 2**21}, r"`neurons` must be a positive whole number"),
    "neurons, none": ({"neurons": {}}, r"`neurons` must map names of modules to numbers"),
    "neurons, a nameless module": ({"neurons": {"": 1}}, r"`neurons` must map names of modules to numbers"),
    "target_modules, a number": ({"target_modules": 5}, r"`target_modules` must be a list of module names"),
    "target_modules, numbers": ({"target_modules": ["a", 5]}, r"`target_modules` must hold names of modules"),
    "target_modules, none": ({"target_modules": []}, r"`target_modules` must hold names of modules"),
    "target_modules, no pattern": (
        {"target_modules": "(mlp"},
        r"must be a regular expression .*Give a list for names",
    ),
    "use_gain": ({"use_gain": "yes"}, r"`use_gain` must be True or False, got 'yes'"),
    "use_gate": ({"use_gate": 1}, r"`use_gate` must be True or False, got 1"),
    "gate_probability, low": (
        {"gate_probability": 0.4},
        r"`gate_probability` must be between 0\.5 and 0\.999999, got 0\.4",
    ),
    "gate_probability, 1": ({"gate_probability": 1.0}, r"`gate_probability` must be between 0\.5 and"),
    "gate_probability, a text": ({"gate_probability": "0.9"}, r"`gate_probability` must be between 0\.5 and"),
    "default_strengths, unknown": ({"default_strengths": {"x": 1}}, r"`default_strengths` names 'x', not one of this"),
    "default_strengths, nan": (
        {"default_strengths": {"value": float("nan")}},
        r"`default_strengths\['value'\]` must be a number between -1e\+06 and 1e\+06, got nan",
    ),
    "default_strengths, large": ({"default_strengths": {"value": 10**400}}, r"must be a number between -1e\+06 and"),
    "default_strengths, a bool": ({"default_strengths": {"value": True}}, r"must be a number between -1e\+06 and"),
    "default_strengths, a list": ({"default_strengths": ["value"]}, r"`default_strengths` must map values to numbers"),
    "units, unknown": (
        {"units": {"x": [1, 1]}},
        r"`units` names 'x', which is not one of this map's values \['value'\]",
    ),
    "units, negative": ({"units": {"value": [-1, 1]}}, r"`units\['value'\]` must be two numbers between 0 and 1e\+06"),
    "units, one": ({"units": {"value": [1]}}, r"`units\['value'\]` must be two numbers"),
    "units, three": ({"units": {"value": [1, 1, 1]}}, r"`units\['value'\]` must be two numbers"),
    "units, nan": ({"units": {"value": [float("nan"), 1]}}, r"`units\['value'\]` must be two numbers"),
    "units, texts": ({"units": {"value": "11"}}, r"`units\['value'\]` must be two numbers"),
    "units, a list": ({"units": []}, r"`units` must map values to two numbers, got list"),
    "ranges, without 0": (
        {"ranges": {"value": [1, 2]}},
        r"`ranges\['value'\]` must hold 0 between its ends, got \[1, 2\]",
    ),
    "ranges, a number": ({"ranges": {"value": 2}}, r"`ranges\['value'\]` must be two numbers"),
    "provenance": ({"provenance": []}, r"`provenance` must be a dictionary, got list"),
    "measurements": ({"measurements": None}, r"`measurements` must be a dictionary, got NoneType"),
    "value_system": ({"value_system": "schwartz"}, r"`value_system` must be a dictionary or None, got str"),
    "base": ({"base": []}, r"`base` must be a dictionary or None, got list"),
    "base_model_name_or_path": (
        {"base_model_name_or_path": 5},
        r"`base_model_name_or_path` must be a text or None, got int",
    ),
    "revision": ({"revision": ["main"]}, r"`revision` must be a text or None, got list"),
}


@pytest.mark.parametrize("what", FIELDS)
def test_config_fields_that_cannot_be_used_are_refused_by_name(what: str) -> None:
    changes, message = FIELDS[what]
    with pytest.raises(NeVAError, match=message):
        NeVAConfig(**changes)


@pytest.mark.parametrize("what", [what for what in FIELDS if what.split(",")[0] not in ("target_modules", "neurons")])
def test_the_same_fields_are_refused_in_files(folder: Path, what: str) -> None:
    changes, _ = FIELDS[what]
    change_config(folder, **changes)
    with pytest.raises(NeVAError):
        load_map(folder)


def test_fields_of_a_newer_version_are_named(folder: Path) -> None:
    change_config(folder, use_magic=True)
    with pytest.raises(
        NeVAError, match=r"fields that this version does not know: use_magic\. .*pip install -U neva-hf"
    ):
        load_map(folder)


@pytest.mark.parametrize(("field", "value"), [("task_type", "NO_SUCH_TASK"), ("peft_type", "NO_SUCH_TYPE")])
def test_types_that_peft_does_not_know_are_refused(folder: Path, field: str, value: str) -> None:
    change_config(folder, **{field: value})
    with pytest.raises(NeVAError, match=value):
        load_map(folder)


def test_more_neurons_than_a_module_has_are_refused() -> None:
    with pytest.raises(
        NeVAError, match=r"`neurons` asks for 65 neurons in 'model\.layers\.0\.mlp\.down_proj', which has"
    ):
        get_peft_model(tiny_model(), NeVAConfig(values=["power"], neurons=65))


def test_a_module_without_its_number_of_neurons_is_refused() -> None:
    config = NeVAConfig(values=["power"], neurons={"model.layers.0.mlp.down_proj": 2}, target_modules=["down_proj"])
    with pytest.raises(NeVAError, match=r"'model\.layers\.1.*' is to be edited, but `neurons` does not say how many"):
        get_peft_model(tiny_model(), config)


# Arguments.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda folder: NeVAModel.from_pretrained(tiny_model()), "A base model was given, but no neuron map"),
        (lambda folder: NeVAModel.from_pretrained("base", folder), "pass the loaded model first"),
        (
            lambda folder: NeVAModel.from_pretrained(tiny_model(), folder, dtype="float32"),
            r"\['dtype'\] are for loading",
        ),
        (lambda folder: NeVAModel.from_pretrained(folder), "does not name its base model: load that first"),
    ],
)
def test_arguments_that_do_not_go_together_say_what_to_do(folder: Path, call: Any, message: str) -> None:
    with pytest.raises(NeVAError, match=message):
        call(folder)


# Whatever else may be in the files.

JUNK: list[Any] = [
    None, True, 0, -1, 5, 10**400, 1.5, float("nan"), float("inf"), "", "x", "NEVA", [], [None], ["x"], [[]], {}, {"x": 1},
    {"x": None}, {"power": [1, 2]}, {"power": "x"}, {"": {}},
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_any_junk_in_any_config_field_gives_a_usable_map_or_a_neva_error(folder: Path) -> None:
    original = json.loads((folder / CONFIG).read_text())
    refused = 0
    for field in original:
        for junk in JUNK:
            (folder / CONFIG).write_text(json.dumps(original | {field: junk}))
            try:
                load_map(folder)
            except NeVAError:
                refused += 1
                continue
            load_model(folder).set_strengths({})
    assert refused > 200


def test_any_flipped_byte_gives_a_usable_map_or_a_neva_error(folder: Path) -> None:
    chance = random.Random(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in (CONFIG, WEIGHTS):
            content = (folder / name).read_bytes()
            # The header of the weights is at the front.
            for _ in range(300):
                damaged = bytearray(content)
                for _ in range(chance.choice([1, 1, 3])):
                    damaged[chance.randrange(min(len(damaged), 2500))] = chance.randrange(256)
                (folder / name).write_bytes(damaged[: chance.choice([len(damaged), len(damaged), len(damaged) - 7])])
                try:
                    load_map(folder)
                except NeVAError:
                    continue
            (folder / name).write_bytes(content)
    load_model(folder)
