"""What is not edited keeps every bit of the base model, negative zeros and all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_edit_against_reference import KINDS
from tiny import ARCHITECTURES, add_map, batch, random_map, tiny_pair

from neva_hf import NeVAError

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
EDITED = {"benevolence": 1.5, "power": -1.0}

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
each_kind = pytest.mark.parametrize("kind", KINDS)
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def assert_same_bits(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert got.dtype == wanted.dtype
    assert torch.equal(got.view(BITS[got.dtype]), wanted.view(BITS[wanted.dtype]))


def logits(model: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(padding="left"), **kwargs).logits


def decoded(model: Any, **kwargs: Any) -> torch.Tensor:
    found = model.generate(
        **batch(padding="left"), max_new_tokens=4, output_logits=True, return_dict_in_generate=True, **kwargs
    )
    return torch.stack(found.logits)


@each_architecture
@each_kind
@each_dtype
def test_rows_at_strength_zero_are_bit_identical_to_the_base_model(
    architecture: str, kind: str, dtype: torch.dtype
) -> None:
    base, model, _ = tiny_pair(architecture, dtype=dtype, **KINDS[kind])
    rows = [EDITED, {}, {"power": 0.0, "security": -0.0}]
    got, wanted = logits(model, strengths=rows), logits(base)
    assert_same_bits(got[1:], wanted[1:])
    assert not torch.equal(got[0], wanted[0])


@each_kind
@each_dtype
def test_rows_at_strength_zero_are_bit_identical_at_every_decode_step(kind: str, dtype: torch.dtype) -> None:
    base, model, _ = tiny_pair(dtype=dtype, **KINDS[kind])
    got, wanted = decoded(model, strengths=[EDITED, {}, {}]), decoded(base)
    assert_same_bits(got[:, 1:], wanted[:, 1:])
    assert not torch.equal(got[:, 0], wanted[:, 0])


@each_kind
@each_dtype
def test_beams_of_rows_at_strength_zero_are_bit_identical_to_the_base_model(kind: str, dtype: torch.dtype) -> None:
    base, model, _ = tiny_pair("gpt2", dtype=dtype, **KINDS[kind])
    got, wanted = decoded(model, strengths=[{}, EDITED, {}], num_beams=2), decoded(base, num_beams=2)
    unedited = [0, 1, 4, 5]
    assert_same_bits(got[:, unedited], wanted[:, unedited])


def after(change: Callable[[Any], Any]) -> Callable[[Any], torch.Tensor]:
    def run(model: Any) -> torch.Tensor:
        change(model)
        return logits(model)

    return run


def with_raising_context(model: Any) -> None:
    with pytest.raises(KeyError), model.strengths(EDITED):
        raise KeyError


def with_raising_call(model: Any) -> None:
    bad = {"input_ids": torch.full((3, 7), 10**6)}
    for strengths in (EDITED, [EDITED, {}, EDITED]):
        with pytest.raises(IndexError):
            model(**bad, strengths=strengths)
        with pytest.raises(IndexError):
            model.generate(**bad, strengths=strengths, max_new_tokens=2)


def with_refused_strengths(model: Any) -> None:
    with pytest.raises(NeVAError):
        model.set_strengths({"benevolence": 1.0, "nothing": 1.0})
    with pytest.raises(NeVAError):
        logits(model, strengths=[EDITED])


def with_nested_contexts(model: Any) -> None:
    with model.strengths(EDITED):
        with model.strengths(power=1.0):
            logits(model)
        logits(model, strengths={"security": 1.0})


def disabled(model: Any) -> torch.Tensor:
    model.set_strengths(EDITED)
    with model.disable_adapter():
        return logits(model)


def disabled_in_a_call(model: Any) -> torch.Tensor:
    with model.disable_adapter():
        return logits(model, strengths=[EDITED, {}, EDITED])


def in_an_empty_context(model: Any) -> torch.Tensor:
    model.set_strengths(EDITED)
    with model.strengths({}):
        return logits(model)


def after_context(model: Any) -> torch.Tensor:
    with model.strengths(EDITED):
        logits(model)
    return logits(model)


NOTHING_DIALLED: dict[str, Callable[[Any], torch.Tensor]] = {
    "as loaded": logits,
    "strengths of 0": lambda model: logits(model, strengths={"benevolence": 0.0, "power": -0.0}),
    "empty strengths": lambda model: logits(model, strengths={}),
    "rows of 0": lambda model: logits(model, strengths=[{}, {"power": 0}, {"security": 0.0}]),
    "set to 0": after(lambda model: model.set_strengths(benevolence=0.0)),
    "set and set back": after(lambda model: (model.set_strengths(EDITED), model.set_strengths({}))),
    "an empty call over set strengths": lambda model: (model.set_strengths(EDITED), logits(model, strengths={}))[1],
    "an empty context over set strengths": in_an_empty_context,
    "adapters disabled": disabled,
    "adapters disabled, strengths in the call": disabled_in_a_call,
    "after an edited call": after(lambda model: logits(model, strengths=EDITED)),
    "after an edited generation": after(lambda model: decoded(model, strengths=[EDITED, {}, EDITED])),
    "after a context": after_context,
    "after nested contexts": after(with_nested_contexts),
    "after a context that raised": after(with_raising_context),
    "after calls that raised": after(with_raising_call),
    "after refused strengths": after(with_refused_strengths),
    "unloaded": lambda model: (model.set_strengths(EDITED), logits(model.unload()))[1],
    "merged at 0": lambda model: logits(model.merge_and_unload()),
    "merged and unmerged": after(
        lambda model: (
            model.set_strengths(EDITED),
            model.merge_adapter(),
            model.unmerge_adapter(),
            model.set_strengths({}),
        )
    ),
}


@pytest.mark.filterwarnings("ignore:The base model's down projections have no bias")
@pytest.mark.parametrize("how", NOTHING_DIALLED)
@pytest.mark.parametrize("kind", ["folded", "gain"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@each_dtype
def test_without_strengths_the_model_is_bit_identical_to_the_base_model(
    architecture: str, how: str, kind: str, dtype: torch.dtype
) -> None:
    base, model, _ = tiny_pair(architecture, dtype=dtype, **KINDS[kind])
    assert_same_bits(NOTHING_DIALLED[how](model), logits(base))


@pytest.mark.parametrize("how", [how for how in NOTHING_DIALLED if "merged" not in how])
@pytest.mark.parametrize("kind", ["gate", "gain and gate"])
def test_without_strengths_gated_maps_are_bit_identical_to_the_base_model(how: str, kind: str) -> None:
    base, model, _ = tiny_pair(**KINDS[kind])
    assert_same_bits(NOTHING_DIALLED[how](model), logits(base))


@each_architecture
@each_dtype
def test_every_architecture_as_loaded_and_disabled_is_bit_identical(architecture: str, dtype: torch.dtype) -> None:
    base, model, _ = tiny_pair(architecture, dtype=dtype, gain=True, gate=True)
    wanted = logits(base)
    assert_same_bits(logits(model), wanted)
    assert_same_bits(disabled(model), wanted)
    assert_same_bits(logits(model.unload()), wanted)


@each_kind
@pytest.mark.parametrize("raise_in_model", [False, True])
def test_strengths_that_are_set_come_back_bit_for_bit_after_a_call_or_context(kind: str, raise_in_model: bool) -> None:
    _, model, _ = tiny_pair(**KINDS[kind])
    model.set_strengths(EDITED)
    wanted = logits(model)
    if raise_in_model:
        with_raising_call(model)
        with_raising_context(model)
    else:
        logits(model, strengths=[{"power": 2.0}, {}, {}])
        after_context(model)
    assert_same_bits(logits(model), wanted)


@each_kind
def test_negative_zeros_of_unedited_rows_stay_negative(kind: str) -> None:
    # y + 0.0 would turn -0.0 into 0.0.
    _, model, _ = tiny_pair(**KINDS[kind])
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    layer.base_layer.register_forward_hook(lambda module, args, output: torch.full_like(output, -0.0))
    with torch.no_grad(), model.strengths([EDITED, {}, {}]):
        got = layer(torch.ones(3, 2, layer.in_features))
    assert_same_bits(got[1:], torch.full_like(got[1:], -0.0))
    assert bool((got[0] != 0).all())


def test_rows_that_only_one_of_two_adapters_edits_are_bit_identical_to_that_one_alone() -> None:
    base, model, _ = tiny_pair(gain=True)
    add_map(model, random_map(base, ["hedonism"], seed=5), "second")
    alone = logits(model, strengths=[EDITED, {}, {}])
    model.base_model.set_adapter(["default", "second"])
    assert_same_bits(logits(model, strengths=[EDITED, {}, {"hedonism": 1.0}])[:2], alone[:2])


def test_an_edited_model_and_its_deep_copy_do_not_share_strengths() -> None:
    base, model, _ = tiny_pair()
    model.set_strengths(EDITED)
    edited = logits(model)
    twin = copy.deepcopy(model)
    assert_same_bits(logits(twin), edited)
    twin.set_strengths({"power": 1.0})
    assert_same_bits(logits(model), edited)
    model.set_strengths({})
    assert_same_bits(logits(model), logits(base))
    assert not torch.equal(logits(twin), logits(base))
