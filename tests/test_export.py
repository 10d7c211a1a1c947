"""Exports as stock PEFT adapters, and what holds for exports of every kind."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import LOAD_STOCK, STRENGTHS, left_in, live_model, logits, logits_alone
from peft import PeftModel
from safetensors.torch import load_file
from tiny import VALUES, add_map, random_map, tiny_reader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from neva_hf import NeuronMap, NeVAError, NeVAModel
from neva_hf.export import CHECK_PROMPTS, export_gguf, export_merged, export_stock, stock
from neva_hf.export.result import NOTE_NAME, as_code
from neva_hf.projection import columns
from neva_hf.strengths import scale_by_units

EXPORTS = {"stock": (export_stock, "out"), "merge": (export_merged, "out"), "gguf": (export_gguf, "out.gguf")}
PUBLISHED = Path(__file__).parent.parent / "model_cards" / "smollm2-135m-instruct-schwartz"


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_stock_adapter_says_the_same_in_a_process_without_neva_hf(architecture: str, tmp_path: Path) -> None:
    model = live_model(architecture, folder=tmp_path / "base")
    made = export_stock(model, tmp_path / "out", STRENGTHS)
    alone = logits_alone(LOAD_STOCK, made.path, tmp_path)
    torch.testing.assert_close(alone, logits(model, strengths=STRENGTHS), atol=1e-5, rtol=0)
    assert (alone - logits(model)).abs().max() > 0.1


def test_a_stock_adapter_holds_the_calibrated_shifts(tmp_path: Path) -> None:
    units = {"power": [0.25, 3.0], "benevolence": [1.0, 2.0]}
    model = live_model(units=units)
    export_stock(model, tmp_path / "out", STRENGTHS)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    neuron_map = NeuronMap.from_model(model)
    coefficients = scale_by_units(torch.tensor([[1.0, -0.5, 0.0]]), VALUES, units)
    assert coefficients.tolist() == [[2.0, -0.125, 0.0]]
    assert len(written) == len(neuron_map.modules)
    for name, edits in neuron_map.modules.items():
        base_layer = model.get_base_model().get_submodule(name).base_layer
        expected = coefficients @ edits.shift @ columns(base_layer, edits.index)
        torch.testing.assert_close(written[f"base_model.model.{name}.beft_bias"], expected)


def test_strengths_that_are_set_are_exported_when_none_are_given(tmp_path: Path) -> None:
    model = live_model()
    model.set_strengths(security=0.75)
    made = export_stock(model, tmp_path / "out")
    assert made.strengths == {"security": 0.75}
    assert made.check.effect > 0.1


def test_all_active_maps_are_exported_together(tmp_path: Path) -> None:
    model = live_model()
    add_map(model, random_map(tiny_reader(), values=["power", "hedonism"], seed=5), "second")
    model.base_model.set_adapter(["default", "second"])
    strengths = {"power": 1.0, "hedonism": -1.0}
    live = logits(model, strengths=strengths)
    export_stock(model, tmp_path / "out", strengths)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(tiny_reader(), str(tmp_path / "out")).eval()
    torch.testing.assert_close(logits(loaded), live, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", EXPORTS)
def test_the_difference_that_is_told_is_the_largest_of_all_logits(kind: str, tmp_path: Path) -> None:
    export, name = EXPORTS[kind]
    made = export(live_model(later=True), tmp_path / name, STRENGTHS)
    assert made.check.difference < 1e-4
    assert made.check.effect > 0.05
    assert made.check.tolerance <= 1e-3
    assert made.to_dict()["largest_logit_difference"] == made.check.difference
    assert left_in(tmp_path) == [name]


@pytest.mark.parametrize("kind", EXPORTS)
def test_an_export_leaves_the_live_model_as_it_was(kind: str, tmp_path: Path) -> None:
    export, name = EXPORTS[kind]
    model = live_model(later=True)
    model.set_strengths(security=1.0)
    model.train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config = model.get_base_model().config.to_dict()
    said = logits(model.eval())
    model.train()
    export(model, tmp_path / name, STRENGTHS)
    assert model.training
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert model.get_base_model().config.to_dict() == config
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model.eval()), said)


@pytest.mark.parametrize("kind", EXPORTS)
def test_gates_are_refused(kind: str, tmp_path: Path) -> None:
    export, name = EXPORTS[kind]
    with pytest.raises(NeVAError, match="has gates"):
        export(live_model(gate=True, later=True), tmp_path / name, STRENGTHS)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    ("strengths", "message"),
    [
        ({}, "All strengths are 0"),
        ({"power": 0.0}, "All strengths are 0"),
        (None, "All strengths are 0"),
        ({"powr": 1.0}, "did you mean 'power'"),
        ({"power": float("nan")}, "must be finite"),
        ([{"power": 1.0}], "one set of strengths"),
    ],
)
def test_strengths_that_cannot_be_frozen_are_refused(strengths: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(NeVAError, match=message):
        export_stock(live_model(), tmp_path / "out", strengths)
    assert left_in(tmp_path) == []


def test_a_value_that_edits_nothing_is_refused(tmp_path: Path) -> None:
    model = live_model()
    with torch.no_grad():
        for edits in model.get_base_model().modules():
            if hasattr(edits, "neva_shift"):
                edits.neva_shift["default"].zero_()
    with pytest.raises(NeVAError, match="edits nothing"):
        export_stock(model, tmp_path / "out", STRENGTHS)


def test_a_strength_beyond_its_range_is_warned_about_once(tmp_path: Path) -> None:
    model = live_model(ranges={"power": [-1.0, 1.0]})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export_stock(model, tmp_path / "out", {"power": 2.0})
    assert len([one for one in caught if "stay fluent" in str(one.message)]) == 1


@pytest.mark.parametrize("wrong", [1.3, 0.0, float("nan")])
def test_an_export_that_is_off_is_refused_with_the_number_and_leaves_nothing(
    wrong: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = stock._write

    def write_wrong(folder: Path, tensors: Any, config: Any) -> None:
        write(folder, {name: tensor * wrong for name, tensor in tensors.items()}, config)

    model = live_model()
    export_stock(model, tmp_path / "out", STRENGTHS)
    kept = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    monkeypatch.setattr(stock, "_write", write_wrong)
    with pytest.raises(NeVAError, match=r"a logit differs by (\d|nan).*Nothing was written"):
        export_stock(model, tmp_path / "new", STRENGTHS)
    with pytest.raises(NeVAError, match="a logit differs"):
        export_stock(model, tmp_path / "out", {"power": 1.0}, force=True)
    assert left_in(tmp_path) == ["out"]
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == kept


def test_a_tolerance_that_is_given_is_kept_to(tmp_path: Path) -> None:
    model = live_model(later=True)
    made = export_gguf(model, tmp_path / "out.gguf", STRENGTHS)
    assert made.check.difference > 0
    with pytest.raises(NeVAError, match="allowed is 0"):
        export_gguf(model, tmp_path / "strict.gguf", STRENGTHS, tolerance=0.0)
    with pytest.raises(NeVAError, match="`tolerance`"):
        export_gguf(model, tmp_path / "strict.gguf", STRENGTHS, tolerance=float("nan"))
    assert left_in(tmp_path) == ["out.gguf"]


def test_half_precision_is_told_from_a_lost_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = live_model().to(torch.bfloat16)
    made = export_stock(model, tmp_path / "out", STRENGTHS)
    assert made.check.tolerance == pytest.approx(made.check.effect / 4)
    monkeypatch.setattr(stock, "_write", _write_nothing)
    with pytest.raises(NeVAError, match=r"In bfloat16 rounding alone may do that.*float32"):
        export_stock(model, tmp_path / "lost", STRENGTHS)


_write = stock._write


def _write_nothing(folder: Path, tensors: Any, config: Any) -> None:
    _write(folder, {name: tensor * 0 for name, tensor in tensors.items()}, config)


@pytest.mark.parametrize("kind", EXPORTS)
def test_what_is_there_is_replaced_by_force_alone(kind: str, tmp_path: Path) -> None:
    export, name = EXPORTS[kind]
    model = live_model(later=True)
    export(model, tmp_path / name, STRENGTHS)
    with pytest.raises(NeVAError, match="already.*--force"):
        export(model, tmp_path / name, STRENGTHS)
    made = export(model, tmp_path / name, {"power": 1.0}, force=True)
    assert made.strengths == {"power": 1.0}
    assert left_in(tmp_path) == [name]


def test_a_folder_with_other_things_is_never_replaced(tmp_path: Path) -> None:
    model = live_model()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for export in (export_stock, export_merged):
        with pytest.raises(NeVAError, match="other things than an export"):
            export(model, tmp_path / "mine", STRENGTHS, force=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "file").write_text("x")
    with pytest.raises(NeVAError, match="is a file"):
        export_stock(model, tmp_path / "file", STRENGTHS, force=True)
    assert left_in(tmp_path) == ["file", "mine"]


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "deep" / "out").mkdir(parents=True)
    export_stock(live_model(), tmp_path / "deep" / "out", STRENGTHS)
    assert NOTE_NAME in left_in(tmp_path / "deep" / "out")


def test_an_interrupted_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stock, "write_card", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_stock(live_model(), tmp_path / "out", STRENGTHS)
    assert left_in(tmp_path) == []


def test_the_note_and_the_card_say_where_an_export_came_from(tmp_path: Path) -> None:
    model = live_model(base_model_name_or_path="someone/base")
    made = export_stock(model, tmp_path / "out", STRENGTHS, source="someone/neva-map")
    note = json.loads((made.path / NOTE_NAME).read_text())
    assert note["kind"] == "stock"
    assert note["neuron_map"] == "someone/neva-map"
    assert note["base_model"] == "someone/base"
    assert note["strengths"] == STRENGTHS
    assert note["largest_logit_difference"] == made.check.difference
    card = (made.path / "README.md").read_text()
    assert "base_model: someone/base" in card
    assert "library_name: peft" in card
    assert "| power | -0.5 |" in card
    assert "`someone/neva-map`" in card
    assert json.loads((made.path / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/base"


def test_a_card_tells_folders_by_their_names_and_lets_no_markup_through(tmp_path: Path) -> None:
    hostile = "x`\n\n# Owned\n<script>\x1b[2J"
    model = live_model(base_model_name_or_path=hostile)
    made = export_stock(model, tmp_path / "out", STRENGTHS, source=str(tmp_path / "secret-parent" / "my-map"))
    card = (made.path / "README.md").read_text()
    assert "secret-parent" not in card
    assert "`my-map`" in card
    assert "\n# Owned" not in card
    assert "\x1b" not in card
    assert "secret-parent" not in (made.path / NOTE_NAME).read_text()
    assert as_code("``") == "`?`"


def test_an_export_can_be_read_by_whoever_may_read_its_other_files(tmp_path: Path) -> None:
    made = export_stock(live_model(), tmp_path / "out", STRENGTHS)
    modes = {item.stat().st_mode & 0o777 for item in made.path.iterdir()}
    assert len(modes) == 1


def test_a_model_without_a_tokenizer_or_prompts_is_refused(tmp_path: Path) -> None:
    model = live_model()
    with pytest.raises(NeVAError, match="prompts"):
        export_stock(model, tmp_path / "out", STRENGTHS, prompts=[])
    model.tokenizer = None
    with pytest.raises(NeVAError, match="tokenizer"):
        export_stock(model, tmp_path / "out", STRENGTHS)


def test_a_model_without_a_map_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NeVAError, match="no NeVA layers"):
        export_stock(tiny_reader(), tmp_path / "out", STRENGTHS)


def test_merged_edits_are_refused(tmp_path: Path) -> None:
    model = live_model()
    model.set_strengths(power=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    with pytest.raises(NeVAError, match="unmerge_adapter"):
        export_stock(model, tmp_path / "out", STRENGTHS)


def test_the_published_map_is_exported_from_the_real_model(
    embedded_base: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    base, tokenizer = embedded_base
    model = NeVAModel.from_map(base, NeuronMap.from_pretrained(PUBLISHED))
    try:
        made = [
            export_stock(model, tmp_path / "adapter", STRENGTHS, tokenizer=tokenizer),
            export_gguf(model, tmp_path / "kind.gguf", STRENGTHS, tokenizer=tokenizer),
        ]
    finally:
        model.unload()
    for one in made:
        assert one.check.difference < 1e-3
        assert one.check.effect > 1
        assert one.check.tokens > 10 * len(CHECK_PROMPTS)
