"""Strengths that cannot be used are refused with a sentence that says what was expected; nothing is dialled then."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from test_bit_identical import assert_same_bits
from tiny import add_map, batch, random_map, tiny_model, tiny_pair

import neva_hf
from neva_hf import NeVAConfig, NeVAError, NeVAModel
from neva_hf.strengths import parse_strengths


def forward(model: NeVAModel, strengths: Any) -> Any:
    return model(**batch(), strengths=strengths)


def generate(model: NeVAModel, strengths: Any) -> Any:
    return model.generate(**batch(), strengths=strengths, max_new_tokens=1)


def context(model: NeVAModel, strengths: Any) -> Any:
    with model.strengths(strengths):
        raise AssertionError("the context was entered")


def function_context(model: NeVAModel, strengths: Any) -> Any:
    with neva_hf.dialled(model, strengths):
        raise AssertionError("the context was entered")


WAYS: dict[str, Callable[[NeVAModel, Any], Any]] = {
    "forward": forward,
    "generate": generate,
    "set_strengths": lambda model, strengths: model.set_strengths(strengths),
    "neva_hf.set_strengths": neva_hf.set_strengths,
    "strengths": context,
    "neva_hf.dialled": function_context,
}
PER_ROW = [way for way in WAYS if "set_strengths" not in way]

REFUSED: dict[str, tuple[Any, str]] = {
    "unknown": (
        {"benevolance": 1.0},
        r"This map has no value 'benevolance' \(did you mean 'benevolence'\?\). It has: benevolence, power, security\.",
    ),
    "unknown, nothing near": ({"xyz": 1.0}, r"This map has no value 'xyz'\. It has: benevolence, power, security\."),
    "not a name": ({3: 1.0}, r"This map has no value 3\."),
    "nan": ({"power": math.nan}, r"The strength of 'power' must be finite, got nan\."),
    "inf": ({"power": math.inf}, r"The strength of 'power' must be finite, got inf\."),
    "-inf": ({"power": -math.inf}, r"The strength of 'power' must be finite, got -inf\."),
    "numpy nan": ({"power": np.float32("nan")}, r"The strength of 'power' must be finite"),
    "too large": ({"power": 1e39}, r"The strength of 'power' is too large: 1e\+39\. Strengths of about 1 are the"),
    "too large for a float": ({"power": 10**400}, r"The strength of 'power' is too large: 1000"),
    "bool": ({"power": True}, r"The strength of 'power' must be a number, got True\."),
    "text": ({"power": "1"}, r"The strength of 'power' must be a number, got '1'\."),
    "None": ({"power": None}, r"The strength of 'power' must be a number, got None\."),
    "tensor": ({"power": torch.tensor(1.0)}, r"The strength of 'power' must be a number, got tensor\(1\.\)\."),
    "a text for all": (
        "power",
        r"must be a dict such as \{'benevolence': 1\.0\} or a list with one dict per row, got str",
    ),
    "a number for all": (
        1.0,
        r"must be a dict such as \{'benevolence': 1\.0\} or a list with one dict per row, got float",
    ),
    "a set": ({"power"}, r"must be a dict such as \{'benevolence': 1\.0\} or a list with one dict per row, got set"),
}


@pytest.fixture
def model() -> NeVAModel:
    return tiny_pair(gain=True)[1]


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("way", WAYS)
def test_strengths_that_make_no_sense_are_refused(model: NeVAModel, way: str, what: str) -> None:
    strengths, message = REFUSED[what]
    if "set_strengths" in way and not isinstance(strengths, dict):
        message = "Strengths that stay are one dict for all rows"
    with pytest.raises(NeVAError, match=message):
        WAYS[way](model, strengths)
    assert model.get_strengths() == {"benevolence": 0.0, "power": 0.0, "security": 0.0}


@pytest.mark.parametrize("what", ["unknown", "nan", "bool"])
@pytest.mark.parametrize("way", PER_ROW)
def test_the_message_names_the_row(model: NeVAModel, way: str, what: str) -> None:
    with pytest.raises(NeVAError, match="of row 1"):
        WAYS[way](model, [{}, REFUSED[what][0], {}])


@pytest.mark.parametrize("way", PER_ROW)
def test_a_row_that_is_no_dict_is_refused(model: NeVAModel, way: str) -> None:
    with pytest.raises(NeVAError, match=r"Strengths of row 2 must be a dict such as .*, got str\."):
        WAYS[way](model, [{}, {}, "power"])


@pytest.mark.parametrize("way", ["forward", "generate"])
@pytest.mark.parametrize("rows", [1, 2, 4, 6])
def test_a_wrong_number_of_rows_is_refused(model: NeVAModel, way: str, rows: int) -> None:
    with pytest.raises(NeVAError, match=rf"Got strengths for {rows} rows, but the batch has 3: pass one dict per row"):
        WAYS[way](model, [{"power": 1.0}] * rows)


@pytest.mark.parametrize("way", ["forward", "generate"])
def test_rows_are_counted_on_inputs_embeds_and_positional_inputs_too(model: NeVAModel, way: str) -> None:
    run = model if way == "forward" else model.generate
    ids = batch()["input_ids"]
    for args, kwargs in (((), {"inputs_embeds": model.get_input_embeddings()(ids)}), ((ids,), {})):
        with pytest.raises(NeVAError, match="Got strengths for 2 rows, but the batch has 3"):
            run(*args, strengths=[{}, {"power": 1.0}], **kwargs)


@pytest.mark.parametrize("way", PER_ROW)
def test_an_empty_list_of_rows_is_refused(model: NeVAModel, way: str) -> None:
    with pytest.raises(NeVAError, match="The list of strengths is empty"):
        WAYS[way](model, [])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("gain", [False, True])
def test_a_context_of_other_rows_than_the_batch_is_refused_when_it_is_run(architecture: str, gain: bool) -> None:
    _, model, _ = tiny_pair(architecture, gain=gain)
    # (OPT flattens 4 x 6 tokens to 24 rows, which three could share.)
    inputs = batch(rows=4, tokens=6)
    message = r"Strengths were given for 3 rows, but the model was run on a batch of 4, which is no multiple"
    with model.strengths([{"power": 1.0}, {}, {"security": 1.0}]):
        with pytest.raises(NeVAError, match=message):
            model(**inputs)
        with pytest.raises(NeVAError, match=message):
            model.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("way", ["set_strengths", "neva_hf.set_strengths"])
def test_strengths_that_stay_are_refused_per_row(model: NeVAModel, way: str) -> None:
    with pytest.raises(NeVAError, match=r"Strengths that stay are one dict for all rows\. For one dict per row pass"):
        WAYS[way](model, [{"power": 1.0}, {}, {}])


def test_a_dict_and_keywords_together_are_refused(model: NeVAModel) -> None:
    message = r"Give strengths as one dict or as keywords, not both \(got a dict and \['security'\]\)"
    for call in (model.set_strengths, model.strengths, lambda *a, **k: neva_hf.set_strengths(model, *a, **k)):
        with pytest.raises(NeVAError, match=message):
            call({"power": 1.0}, security=1.0)


def test_keywords_are_checked_like_a_dict(model: NeVAModel) -> None:
    with pytest.raises(NeVAError, match="did you mean 'power'"):
        model.set_strengths(powr=1.0)
    with pytest.raises(NeVAError, match="must be finite"), model.strengths(power=math.nan):
        pass


@pytest.mark.parametrize("call", [forward, generate])
def test_gates_cannot_be_switched_off_without_strengths(model: NeVAModel, call: Any) -> None:
    run = model if call is forward else model.generate
    with pytest.raises(NeVAError, match=r"`gate=False` goes with strengths"):
        run(**batch(), gate=False)


@pytest.mark.parametrize("way", WAYS)
def test_a_strength_outside_the_calibrated_range_warns_and_works(way: str) -> None:
    _, model, _ = tiny_pair(ranges={"power": [-1.5, 2.0]})
    _, unranged, _ = tiny_pair()
    message = r"The strength 2\.5 of 'power'.* is outside the range .* stay fluent, -1\.5 to 2\."
    with pytest.warns(UserWarning, match=message):
        if "set_strengths" in way:
            WAYS[way](model, {"power": 2.5})
        else:
            with (
                pytest.raises(AssertionError) if way in ("strengths", "neva_hf.dialled") else warnings.catch_warnings()
            ):
                WAYS[way](model, {"power": 2.5})
    with pytest.warns(UserWarning, match="The strength -1.6 of 'power' of row 0"), torch.no_grad():
        got = model(**batch(rows=2), strengths=[{"power": -1.6}, {}]).logits
    with torch.no_grad():
        assert_same_bits(got, unranged(**batch(rows=2), strengths=[{"power": -1.6}, {}]).logits)


@pytest.mark.parametrize("strength", [-1.5, 0, 2.0])
def test_the_ends_of_the_range_do_not_warn(strength: float) -> None:
    _, model, _ = tiny_pair(ranges={"power": [-1.5, 2.0]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.set_strengths(power=strength, benevolence=9.0)


@pytest.mark.parametrize("strength", [1, np.float32(1), np.int64(1), Fraction(1), 1.0])
def test_every_kind_of_real_number_is_a_strength(model: NeVAModel, strength: Any) -> None:
    model.set_strengths(power=strength)
    assert model.get_strengths()["power"] == 1.0


def test_a_tuple_of_dicts_is_a_list_of_rows(model: NeVAModel) -> None:
    rows = [{"power": 1.0}, {}, {}]
    assert_same_bits(forward(model, tuple(rows)).logits, forward(model, rows).logits)


def test_a_value_that_several_adapters_know_is_dialled_in_all_and_others_are_refused_with_all_names() -> None:
    base, model, _ = tiny_pair()
    add_map(model, random_map(base, ["hedonism", "power"], seed=3), "second")
    model.base_model.set_adapter(["default", "second"])
    assert model.values == ["benevolence", "power", "security", "hedonism"]
    model.set_strengths(power=1.0)
    assert model.get_strengths() == {"benevolence": 0.0, "power": 1.0, "security": 0.0, "hedonism": 0.0}
    with pytest.raises(NeVAError, match=r"It has: benevolence, power, security, hedonism\."):
        model.set_strengths(tradition=1.0)


def test_a_model_without_a_map_says_how_to_load_one() -> None:
    for call in (neva_hf.set_strengths, neva_hf.get_strengths):
        with pytest.raises(
            NeVAError, match=r"has no NeVA layers: load a neuron map first.*NeVAModel\.from_pretrained"
        ):
            call(tiny_model())


def test_a_model_without_an_active_adapter_says_how_to_choose_one() -> None:
    _, model, _ = tiny_pair()
    model.base_model.set_adapter([])
    with pytest.raises(NeVAError, match=r"No NeVA adapter is active: choose one with model\.set_adapter"):
        neva_hf.set_strengths(model, {"power": 1.0})


def test_models_of_get_peft_model_refuse_alike() -> None:
    model = get_peft_model(tiny_model(), NeVAConfig(values=["power"], neurons=2))
    with pytest.raises(NeVAError, match="This map has no value 'powr'"):
        model.set_strengths(powr=1.0)
    with pytest.raises(NeVAError, match="Got strengths for 2 rows, but the batch has 3"):
        model(**batch(), strengths=[{}, {}])
    with pytest.raises(NeVAError, match="This map has no value 'powr'"), model.strengths(powr=1.0):
        pass


def test_parsed_strengths_are_finite_float32_with_one_column_per_value() -> None:
    values = ["benevolence", "power"]
    table = parse_strengths([{"power": 1}, {}, {"benevolence": -0.5}], values, rows=3)
    assert table.dtype == torch.float32
    assert table.tolist() == [[0.0, 1.0], [0.0, 0.0], [-0.5, 0.0]]
    assert parse_strengths(None, values).tolist() == [[0.0, 0.0]]
    assert parse_strengths([{"power": 1}] * 3, values, rows=3).tolist() == [[0.0, 1.0]]
