"""What is refused in the files of a map before any of it is used, on our own way of loading and on PEFT's."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_bit_identical import assert_same_bits
from tiny import D_FF, add_map, batch, random_map, tiny_model, tiny_pair

import neva_hf
from neva_hf import NeuronMap, NeVAConfig, NeVAError, NeVAModel, map_files
from neva_hf.config_checks import MAX_MODULES
from neva_hf.dial import neva_layers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FIRST = "base_model.model.model.layers.0.mlp.down_proj."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return random_map(tiny_model(), gain=True).save_pretrained(tmp_path / "map")


def by_peft(folder: Path) -> Any:
    return PeftModel.from_pretrained(tiny_model(), str(folder))


def by_peft_as_a_second_adapter(folder: Path) -> Any:
    model = random_map(tiny_model(), ["hedonism"]).apply_to(tiny_model())
    model.load_adapter(str(folder), "second")
    return model


LOADERS: dict[str, Callable[[Path], Any]] = {
    "NeuronMap": NeuronMap.from_pretrained,
    "NeVAModel": lambda folder: NeVAModel.from_pretrained(tiny_model(), folder),
    "PeftModel": by_peft,
    "load_adapter": by_peft_as_a_second_adapter,
}
each_loader = pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)


def change_text(folder: Path, old: str, new: str) -> None:
    text = (folder / CONFIG).read_text()
    assert old in text
    (folder / CONFIG).write_text(text.replace(old, new, 1))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def change_header(folder: Path, change: Callable[[str], str]) -> None:
    content = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    raw = change(content[8 : 8 + length].decode()).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + length :])


# JSON.


@each_loader
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"use_gate"', '"use_gain": true, "use_gate"', r"adapter_config\.json has 'use_gain' more than once"),
        ('"provenance": {}', '"provenance": {"x": NaN}', r"adapter_config\.json holds the number NaN, which is not"),
        ('"provenance": {}', '"provenance": {"x": -Infinity}', r"holds the number -Infinity, which is not finite"),
        ('"provenance": {}', '"provenance": {"x": 1e999}', r"holds the number 1e999, which is not finite"),
        ('"provenance": {}', '"provenance": {"x": "\\ud800"}', r"'\\ud800', which is not valid Unicode text"),
        ('"provenance": {}', '"provenance": {"\\udfff": 1}', r"'\\udfff', which is not valid Unicode text"),
        ('"provenance": {}', f'"provenance": {{"x": {"[" * 40 + "]" * 40}}}', r"nested more than 32 levels deep"),
        ('"provenance": {}', f'"provenance": {{"x": [{"1," * 500_000}1]}}', r"has more than 500000 parts"),
        ('"use_gate"', '"auto_map": {"AutoModel": "evil.Model"}, "use_gate"', r"does not know: auto_map\."),
    ],
)  # fmt: skip
def test_json_that_python_would_take_is_refused(load: Any, folder: Path, old: str, new: str, message: str) -> None:
    change_text(folder, old, new)
    with pytest.raises(NeVAError, match=message):
        load(folder)


@each_loader
def test_a_value_whose_name_is_a_command_to_a_terminal_is_refused(load: Any, folder: Path) -> None:
    change_text(folder, '"power"', '"\\u001b[2J"')
    with pytest.raises(NeVAError, match=r"'\\x1b\[2J' cannot be the name of a value"):
        load(folder)


@pytest.mark.parametrize("name", ["../../etc/passwd", "a b", "a\n", "é", "x" * 513, "a/b"])
def test_names_that_no_module_has_are_refused(name: str) -> None:
    for field in ({"target_modules": [name]}, {"neurons": {name: 1}}):
        with pytest.raises(
            NeVAError, match=rf"`{next(iter(field))}` names the module .*letters, digits and the signs"
        ):
            NeVAConfig(values=["power"], **field)


def test_more_modules_than_any_model_has_are_refused() -> None:
    names = [f"a.{number}" for number in range(MAX_MODULES + 1)]
    for field in ({"target_modules": names}, {"neurons": dict.fromkeys(names, 1)}):
        with pytest.raises(NeVAError, match="names 4097 modules, and may name 4096"):
            NeVAConfig(values=["power"], **field)


def test_a_few_bytes_cannot_ask_for_gigabytes() -> None:
    counts = {f"layers.{number}": 2**20 for number in range(300)}
    with pytest.raises(
        NeVAError, match=r"`neurons` asks for 314572800 neurons for each of 2 values, .* may have 268435456"
    ):
        NeVAConfig(values=["power", "security"], neurons=counts)


@pytest.mark.parametrize("field", ["provenance", "measurements", "value_system", "base"])
@pytest.mark.parametrize(
    ("content", "message"), [({1: 2}, "has the key 1, which is no text"), ({"a": {1}}, "holds a set")]
)
def test_what_json_cannot_hold_is_refused_before_it_is_saved(field: str, content: Any, message: str) -> None:
    with pytest.raises(NeVAError, match=f"`{field}` .*{message}"):
        NeVAConfig(values=["power"], **{field: content})


def test_a_config_that_cannot_be_opened_is_named(folder: Path) -> None:
    with pytest.raises(NeVAError, match=r"no\.json cannot be read \(No such file or directory\): check the path"):
        map_files.read_config(folder / "no.json")
    with pytest.raises(NeVAError, match=r"no\.safetensors cannot be read \(No such file or directory\)"):
        map_files.check_header(folder / "no.safetensors", NeVAConfig(values=["power"]))


def test_a_pipe_in_place_of_a_file_is_not_waited_for(folder: Path) -> None:
    for name in (CONFIG, WEIGHTS):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(NeVAError, match=rf"There is no neuron map in .*: {name} is missing"):
            NeuronMap.from_pretrained(folder)
        (folder / name).unlink()
        (folder / name).write_bytes(content)
    NeuronMap.from_pretrained(folder)


# Safetensors.


def entry_of(header: str) -> str:
    """The JSON text of one tensor's entry."""
    name = FIRST + "neva_index"
    return f'"{name}":{json.dumps(json.loads(header)[name], separators=(",", ":"))}'


HEADERS: dict[str, tuple[Callable[[str], str], str]] = {
    "a name twice": (lambda text: text.rstrip()[:-1] + f",{entry_of(text)}}}", r"has 'base_.*neva_index' more than once"),
    "a hole": (lambda text: text.replace('"data_offsets":[0,', '"data_offsets":[4,', 1), r"is said to be at bytes 4 to"),
    "a shape of more": (lambda text: text.replace('"shape":[6]', '"shape":[7]', 1), r"of I32 \[7\] is said to be at bytes"),
    "a giant": (lambda text: text.replace('"shape":[6]', '"shape":[99999999999]', 1), r"of I32 \[99999999999\] is said"),
    "a negative size": (lambda text: text.replace('"shape":[6]', '"shape":[-6]', 1), r"has the shape \[-6\]"),
    "half a size": (lambda text: text.replace('"shape":[6]', '"shape":[6.0]', 1), r"has the shape \[6\.0\]"),
    "a dtype of no name": (lambda text: text.replace('"I32"', '"I31"', 1), r"has the dtype 'I31', which PyTorch has no"),
    "no dtype": (lambda text: text.replace('"dtype":"I32",', "", 1), r"must have a dtype, a shape and data_offsets, and"),
    "one more thing": (lambda text: text.replace('"dtype"', '"code":"x","dtype"', 1), r"data_offsets, and nothing else"),
    "metadata of numbers": (lambda text: text.replace('"pt"', "5", 1), r"__metadata__ must map texts to texts"),
    "nothing": (lambda text: "{}", r"its tensors take 0 bytes, but \d+ follow the header"),
    "no object": (lambda text: "[]", r"the header of adapter_model\.safetensors must hold a JSON object, got list"),
}  # fmt: skip


@each_loader
@pytest.mark.parametrize("what", HEADERS)
def test_a_header_that_does_not_describe_its_bytes_is_refused(load: Any, folder: Path, what: str) -> None:
    change, message = HEADERS[what]
    change_header(folder, change)
    with pytest.raises(NeVAError, match=message):
        load(folder)


@pytest.mark.parametrize("what", ["dtype", "shape", "strange", "missing"])
def test_what_the_header_tells_is_checked_before_a_tensor_is_read(
    what: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
        "dtype": lambda t: t.update({FIRST + "neva_shift": t[FIRST + "neva_shift"].double()}),
        "shape": lambda t: t.update({FIRST + "neva_shift": torch.zeros(4, 6)}),
        "strange": lambda t: t.update({"code": torch.zeros(1)}),
        "missing": lambda t: t.pop(FIRST + "neva_shift"),
    }
    change_tensors(folder, changes[what])

    def opened(*_: Any, **__: Any) -> Any:
        raise AssertionError("tensors were read")

    monkeypatch.setattr(map_files, "safe_open", opened)
    with pytest.raises(NeVAError, match="F64|must be float32|'code', which is no tensor|has no neva_shift"):
        NeuronMap.from_pretrained(folder)


def test_a_map_does_not_change_when_its_file_is_overwritten_later(folder: Path) -> None:
    neuron_map = NeuronMap.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in neuron_map.state_dict().items()}
    with open(folder / WEIGHTS, "r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(b"\xff" * 64)
    for name, tensor in neuron_map.state_dict().items():
        assert torch.equal(tensor, before[name])


# Pickles and code.


class Opened:
    """Runs something when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["NEVA_TEST_MARK"],)


@each_loader
@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickle_is_refused_by_name_and_never_read(
    load: Any, beside: bool, name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEVA_TEST_MARK", str(tmp_path / "was run"))
    torch.save({"x": Opened()}, folder / name)
    if not beside:
        (folder / WEIGHTS).unlink()
    says = (
        rf"{name} lies in the folder .*it is a pickle" if beside or load in PEFT_LOADERS else r"safetensors is missing"
    )
    with pytest.raises(NeVAError, match=says):
        load(folder)
    assert not (tmp_path / "was run").exists()


PEFT_LOADERS = (by_peft, by_peft_as_a_second_adapter)


@each_loader
def test_code_beside_a_map_is_not_run(load: Any, folder: Path, tmp_path: Path) -> None:
    for name in ("modeling_evil.py", "__init__.py", "configuration.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'was run')!r}, 'w')")
    load(folder)
    assert not (tmp_path / "was run").exists()


# What PEFT reads itself.

NUMBERS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "nan": (lambda t: t[FIRST + "neva_shift"].fill_(float("nan")), r"neva_shift of .* not finite"),
    "inf": (lambda t: t[FIRST + "neva_gain"].fill_(float("inf")), r"neva_gain of .* not finite"),
    "a neuron twice": (lambda t: t[FIRST + "neva_index"].fill_(3), r"must name each neuron once"),
    "a negative neuron": (lambda t: t[FIRST + "neva_index"][:1].fill_(-1), r"by a number of at least 0"),
}


@pytest.mark.parametrize("load", PEFT_LOADERS)
@pytest.mark.parametrize("what", NUMBERS)
def test_numbers_that_cannot_be_used_are_refused_by_peft_too(load: Any, what: str, folder: Path) -> None:
    change, message = NUMBERS[what]
    change_tensors(folder, change)
    with pytest.raises(NeVAError, match=message):
        load(folder)


@pytest.mark.parametrize("what", NUMBERS)
def test_numbers_that_transformers_loads_unseen_are_refused_when_they_are_dialled(what: str, folder: Path) -> None:
    change, message = NUMBERS[what]
    change_tensors(folder, change)
    base = tiny_model()
    base.load_adapter(str(folder))
    with pytest.raises(NeVAError, match=message):
        neva_hf.set_strengths(base, {"power": 1.0})


def test_tensors_of_another_adapter_are_refused_by_peft() -> None:
    base, _, neuron_map = tiny_pair()
    model = get_peft_model(base, neuron_map.config)
    good = neuron_map.state_dict()
    for tensors, message in (
        (
            good | {"base_model.model.lm_head.weight": torch.zeros(1)},
            r"hold 'base_model\.model\.lm_head\.weight', which",
        ),
        ({name: tensor for name, tensor in good.items() if name != FIRST + "neva_index"}, r"has no neva_index"),
        (good | {FIRST + "neva_shift": good[FIRST + "neva_shift"].half()}, r"must be float32"),
        (
            good | {FIRST + "neva_shift": good[FIRST + "neva_shift"][:2]},
            r"must be float32 \[3, 6\], got float32 \[2, 6\]",
        ),
        (
            good | {FIRST + "neva_index": good[FIRST + "neva_index"] + D_FF},
            r"names neuron|edits neuron .* has only 64",
        ),
    ):
        with pytest.raises(NeVAError, match=message):
            set_peft_model_state_dict(model, tensors)
    set_peft_model_state_dict(model, good)
    assert NeuronMap.from_model(model).state_dict().keys() == good.keys()


EXPRESSION = r"(([a-z0-9_.])+)+\.down_proj"


def test_a_strangers_expression_is_never_run(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    # (on a name that it does not match, this one would take longer than anyone waits)
    (folder / CONFIG).write_text(json.dumps(config | {"target_modules": EXPRESSION}))
    for load in LOADERS.values():
        loaded = load(folder)
        found = loaded.config.target_modules if isinstance(loaded, NeuronMap) else neva_layers(loaded)
        assert len(found) == 2
    with pytest.raises(NeVAError, match="is the regular expression .* those of files are not run"):
        tiny_model().load_adapter(str(folder))


def test_an_expression_of_ones_own_is_saved_as_the_names_that_it_found(tmp_path: Path) -> None:
    config = NeVAConfig(values=["power"], neurons=3, target_modules=r".*\.1\.mlp\.down_proj")
    get_peft_model(tiny_model(), config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == ["model.layers.1.mlp.down_proj"]
    assert len(neva_layers(by_peft(tmp_path))) == 1


def test_a_refused_adapter_leaves_the_first_one_as_it_was(folder: Path) -> None:
    model = random_map(tiny_model(), ["hedonism"]).apply_to(tiny_model())
    with torch.no_grad():
        before = model(**batch(), strengths={"hedonism": 1.0}).logits
    change_header(folder, lambda text: text.replace('"I32"', '"U32"', 1))
    with pytest.raises(NeVAError, match="must be I32, got U32"):
        model.load_adapter(str(folder), "second")
    with torch.no_grad():
        assert_same_bits(model(**batch(), strengths={"hedonism": 1.0}).logits, before)
    add_map(model, random_map(tiny_model()), "second")
