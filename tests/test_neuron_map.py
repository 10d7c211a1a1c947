"""Neuron maps by themselves: reading, writing, cutting, comparing."""

from __future__ import annotations

import copy
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bit_identical import assert_same_bits
from test_edit_against_reference import KINDS, ROWS, assert_near
from tiny import add_map, batch, random_map, tiny_model, tiny_pair

from neva_hf import NeuronMap, NeVAConfig, NeVAError
from neva_hf import neuron_map as module
from neva_hf.neuron_map import ModuleEdits, natural_order

each_kind = pytest.mark.parametrize("kind", KINDS)


def small_map(**config: Any) -> NeuronMap:
    """Two values on two modules: power edits neurons 5 and 9, security 9 and, in the other module, 2."""
    first = ModuleEdits(
        index=torch.tensor([9, 5, 7], dtype=torch.int32), shift=torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]])
    )
    second = ModuleEdits(index=torch.tensor([2], dtype=torch.int32), shift=torch.tensor([[0.0], [4.0]]))
    return NeuronMap(NeVAConfig(values=["power", "security"], **config), {"a": first, "b": second})


def logits(model: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(), **kwargs).logits


# What is in a map.


def test_neurons_are_those_that_a_value_edits_in_order() -> None:
    neuron_map = small_map()
    assert {name: index.tolist() for name, index in neuron_map.neurons("power").items()} == {"a": [5, 9]}
    assert {name: index.tolist() for name, index in neuron_map.neurons("security").items()} == {"a": [9], "b": [2]}
    assert neuron_map.neuron_counts() == {"power": {"a": 2}, "security": {"a": 1, "b": 1}}


def test_a_gain_alone_counts_as_an_edit() -> None:
    edits = ModuleEdits(
        index=torch.tensor([1, 4], dtype=torch.int32), shift=torch.zeros(1, 2), gain=torch.tensor([[0.0, 0.5]])
    )
    neuron_map = NeuronMap(NeVAConfig(values=["power"], use_gain=True), {"a": edits})
    assert neuron_map.neurons("power")["a"].tolist() == [4]


def test_the_config_of_a_map_names_its_modules_and_counts() -> None:
    neuron_map = small_map()
    assert neuron_map.config.neurons == {"a": 3, "b": 1}
    assert neuron_map.config.target_modules == ["a", "b"]
    assert neuron_map.config.inference_mode


@pytest.mark.parametrize("call", [lambda m: m.neurons("powr"), lambda m: m.select(["powr"])])
def test_an_unknown_value_is_refused_with_the_nearest_name(call: Any) -> None:
    with pytest.raises(NeVAError, match="no value 'powr' .did you mean 'power'"):
        call(small_map())


def test_overlap_is_shared_neurons_over_all_neurons() -> None:
    found = small_map().overlap()
    assert found["power", "power"] == found["security", "security"] == 1.0
    assert found["power", "security"] == found["security", "power"] == 1 / 3


def test_overlap_between_maps_compares_neurons_of_modules_of_the_same_name() -> None:
    other = NeuronMap(
        NeVAConfig(values=["hedonism"]),
        {"b": ModuleEdits(index=torch.tensor([2, 5], dtype=torch.int32), shift=torch.ones(1, 2))},
    )
    assert small_map().overlap(other) == {("power", "hedonism"): 0.0, ("security", "hedonism"): 1 / 3}


def test_overlap_of_values_without_neurons_is_zero() -> None:
    neuron_map = small_map()
    for edits in neuron_map.modules.values():
        edits.shift[0] = 0
    assert neuron_map.overlap()["power", "power"] == 0.0


# Cutting.


@each_kind
def test_a_selected_map_edits_like_the_whole_one_does_for_its_values(kind: str) -> None:
    base, whole, neuron_map = tiny_pair(
        units={"power": [0.5, 2.0], "benevolence": [3.0, 3.0]},
        ranges={"power": [-9.0, 9.0]},
        default_strengths={"benevolence": 1.0},
        **KINDS[kind],
    )
    selected = neuron_map.select(["security", "power"])
    assert selected.values == ["security", "power"]
    assert selected.config.units == {"power": [0.5, 2.0]}
    assert selected.config.ranges == {"power": [-9.0, 9.0]}
    assert selected.config.default_strengths == {}
    rows = [{"power": 1.0}, {}, {"security": -1.0, "power": 0.5}]
    got = logits(selected.apply_to(tiny_model()), strengths=rows)
    assert_near(got, logits(whole, strengths=rows))


def test_a_selected_map_keeps_only_what_its_values_need() -> None:
    selected = small_map().select(["power"])
    assert list(selected.modules) == ["a"]
    assert selected.modules["a"].index.tolist() == [9, 5]
    assert selected.modules["a"].shift.tolist() == [[1.0, 2.0]]


def test_neurons_that_gates_only_read_stay() -> None:
    base, whole, neuron_map = tiny_pair(gate=True)
    for edits in neuron_map.modules.values():
        edits.shift[:, :4] = 0
    whole = neuron_map.apply_to(tiny_model())
    selected = neuron_map.select(["power"])
    assert_near(logits(selected.apply_to(base), strengths={"power": 1.0}), logits(whole, strengths={"power": 1.0}))


def test_a_selected_map_is_a_copy() -> None:
    neuron_map = small_map()
    selected = neuron_map.select(["power", "security"])
    selected.modules["a"].shift.zero_()
    selected.config.provenance["x"] = 1
    assert neuron_map.modules["a"].shift[0, 0] == 1.0


def test_selecting_values_that_edit_nothing_says_so() -> None:
    neuron_map = small_map()
    for edits in neuron_map.modules.values():
        edits.shift[0] = 0
    with pytest.raises(NeVAError, match="In this map power edits no neuron"):
        neuron_map.select(["power"])
    for given, message in (
        ([], "1 to 256 names"),
        ("power", "must be a list of names"),
        (["power"] * 2, "stand more"),
    ):
        with pytest.raises(NeVAError, match=message):
            neuron_map.select(given)


# Reading and writing.


@each_kind
def test_what_is_saved_is_what_is_loaded(kind: str, tmp_path: Path) -> None:
    neuron_map = random_map(tiny_model("gpt2"), provenance={"method": "random"}, **KINDS[kind])
    loaded = NeuronMap.from_pretrained(neuron_map.save_pretrained(tmp_path / "new" / "folder"))
    assert loaded == neuron_map
    assert list(loaded.modules) == list(neuron_map.modules)


def test_maps_differ_when_a_number_a_tensor_or_a_setting_differs() -> None:
    neuron_map = small_map()
    assert neuron_map == small_map()
    assert neuron_map != small_map(units={"power": [1.0, 2.0]})
    changed = copy.deepcopy(neuron_map)
    changed.modules["a"].shift[0, 0] += 1e-7
    assert changed != neuron_map
    assert small_map() != "a map"
    edits = neuron_map.modules["b"]
    assert edits != ModuleEdits(edits.index, edits.shift, gain=torch.zeros_like(edits.shift))


def test_saving_twice_replaces_the_map(tmp_path: Path) -> None:
    first, second = random_map(tiny_model(), gain=True), random_map(tiny_model(), ["hedonism"], neurons=9)
    for neuron_map in (first, second, first, first):
        neuron_map.save_pretrained(tmp_path)
        assert NeuronMap.from_pretrained(tmp_path) == neuron_map
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]


def test_saving_over_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "map").write_text("mine")
    with pytest.raises(NeVAError, match="is a file; give a folder to save the neuron map in"):
        small_map().save_pretrained(tmp_path / "map")
    assert (tmp_path / "map").read_text() == "mine"


def test_saving_leaves_other_files_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    small_map().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("step", range(5))
def test_a_save_that_was_cut_off_at_any_step_leaves_a_whole_map_or_none(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of the same shape, so that a mixture of the two would load.
    old, new = random_map(tiny_model(), seed=1), random_map(tiny_model(), seed=2, units={"power": [7.0, 7.0]})
    old.save_pretrained(tmp_path)

    class CutOffError(Exception):
        pass

    count = 0

    def cut_off_at_step(original: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count > step:
                raise CutOffError
            return original(*args, **kwargs)

        return run

    monkeypatch.setattr(module, "save_file", cut_off_at_step(module.save_file))
    monkeypatch.setattr(NeVAConfig, "save_pretrained", cut_off_at_step(NeVAConfig.save_pretrained))
    monkeypatch.setattr(Path, "unlink", cut_off_at_step(Path.unlink))
    monkeypatch.setattr(module.os, "replace", cut_off_at_step(os.replace))
    with pytest.raises(CutOffError):
        new.save_pretrained(tmp_path)
    try:
        found = NeuronMap.from_pretrained(tmp_path)
    except NeVAError as error:
        assert "There is no neuron map" in str(error)
    else:
        assert found == old


def test_a_reader_beside_a_writer_never_sees_half_a_map(tmp_path: Path) -> None:
    maps = [random_map(tiny_model(), neurons=count) for count in (3, 6)]
    maps[0].save_pretrained(tmp_path)
    done = threading.Event()

    def write() -> None:
        for number in range(40):
            maps[number % 2].save_pretrained(tmp_path)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    loaded = 0
    while not done.is_set():
        try:
            found = NeuronMap.from_pretrained(tmp_path)
        except (NeVAError, FileNotFoundError):
            continue
        assert found in maps
        loaded += 1
    writer.join()
    assert NeuronMap.from_pretrained(tmp_path) == maps[1]


def test_files_hold_nothing_but_json_and_the_tensors_of_the_map(tmp_path: Path) -> None:
    random_map(tiny_model()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "NEVA"
    assert config["inference_mode"] is True
    # Two layers of 6 int32 indices and 3 x 6 float32 shifts, and a header.
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 2 * (6 * 4 + 18 * 4) + 1000


def test_layers_are_read_in_their_natural_order() -> None:
    names = ["layers.10", "layers.9", "layers.²", "layers.99999999999999999999", "a.b", "a", ""]
    ordered = sorted(names, key=natural_order)
    assert ordered.index("layers.9") < ordered.index("layers.10")
    assert sorted(ordered) == sorted(names)


# With models.


@each_kind
def test_a_map_comes_out_of_a_model_as_it_went_in(kind: str) -> None:
    _, model, neuron_map = tiny_pair("opt", provenance={"method": "random"}, **KINDS[kind])
    model.set_strengths(power=1.0)
    taken = NeuronMap.from_model(model)
    assert taken == neuron_map
    taken.modules[next(iter(taken.modules))].shift.zero_()
    assert NeuronMap.from_model(model) == neuron_map


def test_each_adapter_of_a_model_gives_its_own_map() -> None:
    base, model, first = tiny_pair()
    second = random_map(base, ["hedonism"], gain=True, seed=4)
    add_map(model, second, "second")
    assert NeuronMap.from_model(model) == first
    assert NeuronMap.from_model(model, "second").state_dict().keys() == second.state_dict().keys()
    with pytest.raises(NeVAError, match="no NeVA adapter named 'third'"):
        NeuronMap.from_model(model, "third")
    with pytest.raises(NeVAError, match="no NeVA adapter named 'default'"):
        NeuronMap.from_model(base)


def test_one_map_can_be_put_on_many_models() -> None:
    neuron_map = random_map(tiny_model())
    first, second = (neuron_map.apply_to(tiny_model()) for _ in range(2))
    first.set_strengths(power=3.0)
    assert_same_bits(logits(second), logits(tiny_model()))
    assert_same_bits(logits(first, strengths=ROWS), logits(second, strengths=ROWS))
