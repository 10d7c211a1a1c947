"""The adapter gives the logits of plain hooks (reference.py), in one forward pass and at every decode step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import Row, edited, needed_share
from tiny import ARCHITECTURES, add_map, batch, random_map, tiny_model, tiny_pair
from transformers.generation.streamers import BaseStreamer

ROWS: list[Row] = [{"benevolence": 1.0, "power": -0.5}, {}, {"security": -2.0, "power": 0.7}]
STRENGTHS: dict[str, Row | list[Row]] = {"one for all rows": ROWS[0], "one per row": ROWS}
UNITS = {"power": [0.5, 2.0], "security": [1.5, 0.25]}
KINDS: dict[str, dict[str, bool]] = {
    "folded": {},
    "gain": {"gain": True},
    "gate": {"gate": True},
    "gain and gate": {"gain": True, "gate": True},
}
ALL_MODES_ON = ["llama", "gpt2", "opt"]
TOKENS = 5

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
each_kind = pytest.mark.parametrize("kind", KINDS)
each_strengths = pytest.mark.parametrize("strengths", STRENGTHS.values(), ids=STRENGTHS)


def assert_near(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-5)


def generate(model: Any, inputs: dict[str, Any], seed: int = 0, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    return model.generate(
        **inputs,
        max_new_tokens=TOKENS,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **kwargs,
    )


def assert_same_generation(got: Any, wanted: Any) -> None:
    assert torch.equal(got.sequences, wanted.sequences)
    assert len(got.logits) == len(wanted.logits) > 0
    for step in range(len(got.logits)):
        assert_near(got.logits[step], wanted.logits[step])
        assert_near(got.scores[step], wanted.scores[step])


# One forward pass.


@each_architecture
@each_kind
@each_strengths
def test_forward_gives_the_logits_of_plain_hooks(architecture: str, kind: str, strengths: Any) -> None:
    base, model, neuron_map = tiny_pair(architecture, units=UNITS, **KINDS[kind])
    inputs = batch(padding="left")
    with torch.no_grad(), edited(base, (neuron_map, strengths)):
        wanted = base(**inputs).logits
    with torch.no_grad():
        assert_near(model(**inputs, strengths=strengths).logits, wanted)
        assert not torch.allclose(model(**inputs).logits, wanted, atol=0.1), "the edit should be seen"


@each_architecture
@pytest.mark.parametrize("kind", ["folded", "gain and gate"])
def test_strengths_that_are_set_give_the_logits_of_plain_hooks(architecture: str, kind: str) -> None:
    base, model, neuron_map = tiny_pair(architecture, units=UNITS, **KINDS[kind])
    inputs = batch()
    model.set_strengths(ROWS[2])
    with torch.no_grad(), edited(base, (neuron_map, ROWS[2])):
        assert_near(model(**inputs).logits, base(**inputs).logits)


@each_kind
@pytest.mark.parametrize("padding", ["left", "right", None])
@pytest.mark.parametrize("architecture", ALL_MODES_ON)
def test_padding_on_either_side_is_edited_like_plain_hooks(architecture: str, kind: str, padding: str | None) -> None:
    base, model, neuron_map = tiny_pair(architecture, units=UNITS, **KINDS[kind])
    inputs = batch(padding=padding)
    with torch.no_grad(), edited(base, (neuron_map, ROWS)):
        assert_near(model(**inputs, strengths=ROWS).logits, base(**inputs).logits)


@each_kind
def test_units_scale_negative_and_positive_strengths_apart(kind: str) -> None:
    base, model, neuron_map = tiny_pair(units={"power": [0.5, 2.0]}, **KINDS[kind])
    _, plain, _ = tiny_pair(**KINDS[kind])
    inputs = batch()
    with torch.no_grad():
        for strength, times in ((-1.0, 0.5), (1.0, 2.0)):
            scaled = model(**inputs, strengths={"power": strength}).logits
            assert_near(scaled, plain(**inputs, strengths={"power": strength * times}).logits)


@each_kind
def test_gates_that_are_switched_off_edit_like_plain_hooks_without_gates(kind: str) -> None:
    base, model, neuron_map = tiny_pair(units=UNITS, **KINDS[kind])
    inputs = batch()
    with torch.no_grad(), edited(base, (neuron_map, ROWS), gate=False):
        wanted = base(**inputs).logits
    with torch.no_grad():
        assert_near(model(**inputs, strengths=ROWS, gate=False).logits, wanted)
        with model.strengths(ROWS, gate=False):
            assert_near(model(**inputs).logits, wanted)


@pytest.mark.parametrize("probability", [0.5, 0.99])
def test_gates_reach_for_the_probability_of_the_config(probability: float) -> None:
    base, model, neuron_map = tiny_pair(gate=True, gain=True, gate_probability=probability)
    inputs = batch()
    with torch.no_grad(), edited(base, (neuron_map, ROWS)):
        assert_near(model(**inputs, strengths=ROWS).logits, base(**inputs).logits)


def test_gates_close_open_and_stop_halfway_on_these_inputs() -> None:
    # Otherwise the tests above would not see all three branches of a gate.
    base, model, neuron_map = tiny_pair(gate=True)
    inputs = batch()
    name, edits = next(iter(neuron_map.modules.items()))
    seen: list[torch.Tensor] = []
    base.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        base(**inputs)
    x = seen[0].reshape(-1, seen[0].shape[-1])[:, edits.index.long()].double()
    full = edits.shift[1].double().expand_as(x)
    share = torch.cat([needed_share(x, sign * full, edits, 1, sign, 0.6) for sign in (-1.0, 1.0)])
    assert bool((share == 0).any())
    assert bool((share == 1).any())
    assert bool(((share > 0) & (share < 1)).any())


@pytest.mark.parametrize("architecture", ALL_MODES_ON)
@pytest.mark.parametrize("second_kind", KINDS)
def test_several_active_adapters_add_up_like_plain_hooks(architecture: str, second_kind: str) -> None:
    base, model, first = tiny_pair(architecture, units=UNITS)
    second = random_map(base, ["hedonism", "power"], neurons=9, seed=7, **KINDS[second_kind])
    add_map(model, second, "second")
    model.base_model.set_adapter(["default", "second"])
    rows: list[Row] = [{"benevolence": 1.0, "hedonism": 0.5}, {}, {"power": -1.0}]
    inputs = batch()
    firsts = [{name: s for name, s in row.items() if name in first.values} for row in rows]
    seconds = [{name: s for name, s in row.items() if name in second.values} for row in rows]
    with torch.no_grad(), edited(base, (first, firsts), (second, seconds)):
        wanted = base(**inputs)
        assert_near(model(**inputs, strengths=rows).logits, wanted.logits)
        wanted = generate(base, inputs)
    assert_same_generation(generate(model, inputs, strengths=rows), wanted)


@pytest.mark.parametrize("kind", ["folded", "gain and gate"])
def test_rows_of_strengths_reach_the_rows_of_inputs_embeds(kind: str) -> None:
    base, model, neuron_map = tiny_pair(**KINDS[kind])
    embeds = base.get_input_embeddings()(batch()["input_ids"]).detach()
    with torch.no_grad(), edited(base, (neuron_map, ROWS)):
        wanted = base(inputs_embeds=embeds).logits
    with torch.no_grad():
        assert_near(model(inputs_embeds=embeds, strengths=ROWS).logits, wanted)


def test_input_ids_may_be_given_by_position() -> None:
    base, model, neuron_map = tiny_pair()
    ids = batch()["input_ids"]
    with torch.no_grad(), edited(base, (neuron_map, ROWS)):
        assert_near(model(ids, strengths=ROWS).logits, base(ids).logits)
        wanted = generate(base, {"inputs": ids})
    assert_same_generation(generate(model, {"inputs": ids}, strengths=ROWS), wanted)
    assert torch.equal(model.generate(ids, strengths=ROWS, max_new_tokens=TOKENS), wanted.sequences)


# Generation, at every decode step.

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 0},
    "beam search": {"num_beams": 3},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "returned sequences": {"do_sample": True, "num_return_sequences": 2},
    "beams and returned sequences": {"num_beams": 4, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "prompt in chunks": {"prefill_chunk_size": 3},
}


@each_strengths
@pytest.mark.parametrize("kind", ["folded", "gain and gate"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ALL_MODES_ON)
def test_every_decode_step_gives_the_logits_of_plain_hooks(
    architecture: str, mode: str, kind: str, strengths: Any
) -> None:
    base, model, neuron_map = tiny_pair(architecture, units=UNITS, **KINDS[kind])
    inputs = batch(padding="left")
    with edited(base, (neuron_map, strengths)):
        wanted = generate(base, inputs, **MODES[mode])
    assert_same_generation(generate(model, inputs, strengths=strengths, **MODES[mode]), wanted)


@pytest.mark.parametrize("mode", ["greedy", "beams and returned sequences"])
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in ALL_MODES_ON])
def test_other_architectures_decode_like_plain_hooks(architecture: str, mode: str) -> None:
    base, model, neuron_map = tiny_pair(architecture, units=UNITS, gain=True, gate=True)
    inputs = batch(padding="left")
    with edited(base, (neuron_map, ROWS)):
        wanted = generate(base, inputs, **MODES[mode])
    assert_same_generation(generate(model, inputs, strengths=ROWS, **MODES[mode]), wanted)


@each_kind
@pytest.mark.parametrize("mode", ["greedy", "beams and returned sequences"])
@pytest.mark.parametrize("architecture", ALL_MODES_ON)
def test_a_context_dials_every_decode_step(architecture: str, mode: str, kind: str) -> None:
    base, model, neuron_map = tiny_pair(architecture, **KINDS[kind])
    inputs = batch()
    with edited(base, (neuron_map, ROWS)):
        wanted = generate(base, inputs, **MODES[mode])
    with model.strengths(ROWS):
        assert_same_generation(generate(model, inputs, **MODES[mode]), wanted)


@each_kind
@pytest.mark.parametrize("how", ["assistant model", "prompt lookup"])
@pytest.mark.parametrize("as_rows", [False, True])
@pytest.mark.parametrize("architecture", ALL_MODES_ON)
def test_assisted_generation_is_edited_like_plain_hooks(architecture: str, how: str, as_rows: bool, kind: str) -> None:
    base, model, neuron_map = tiny_pair(architecture, **KINDS[kind])
    # Repeated tokens give the prompt lookup something to find.
    inputs = {"input_ids": batch(rows=1)["input_ids"].repeat(1, 2)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])

    def assisted() -> dict[str, Any]:
        if how == "prompt lookup":
            return {"prompt_lookup_num_tokens": 3}
        return {"assistant_model": tiny_model(architecture, seed=0)}

    strengths = ROWS[:1] if as_rows else ROWS[0]
    with edited(base, (neuron_map, ROWS[0])):
        plain = generate(base, inputs)
        wanted = generate(base, inputs, **assisted())
    got = generate(model, inputs, strengths=strengths, **assisted())
    assert_same_generation(got, wanted)
    assert torch.equal(got.sequences, plain.sequences)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
@pytest.mark.parametrize("kind", ["folded", "gain and gate"])
def test_generation_from_inputs_embeds_is_edited_like_plain_hooks(architecture: str, kind: str) -> None:
    base, model, neuron_map = tiny_pair(architecture, **KINDS[kind])
    embeds = base.get_input_embeddings()(batch()["input_ids"]).detach()
    inputs = {"inputs_embeds": embeds, "attention_mask": torch.ones(embeds.shape[:2], dtype=torch.long)}
    with edited(base, (neuron_map, ROWS)):
        wanted = generate(base, inputs)
    assert_same_generation(generate(model, inputs, strengths=ROWS), wanted)


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.reshape(-1).tolist()

    def end(self) -> None:
        pass


@each_kind
def test_a_streamer_gets_the_edited_tokens(kind: str) -> None:
    base, model, neuron_map = tiny_pair(**KINDS[kind])
    inputs, streamer = batch(rows=1), Collect()
    with edited(base, (neuron_map, ROWS[0])):
        wanted = generate(base, inputs)
    assert_same_generation(generate(model, inputs, strengths=ROWS[0], streamer=streamer), wanted)
    assert streamer.tokens == wanted.sequences[0].tolist()


def test_a_cache_filled_under_an_edit_goes_on_under_it() -> None:
    # Chats keep the cache from turn to turn.
    base, model, neuron_map = tiny_pair(gain=True)
    ids = batch(tokens=9)["input_ids"]
    with torch.no_grad(), edited(base, (neuron_map, ROWS)):
        wanted = base(ids).logits[:, 5:]
    with torch.no_grad():
        first = model(ids[:, :5], strengths=ROWS, use_cache=True)
        second = model(ids[:, 5:], strengths=ROWS, past_key_values=first.past_key_values)
    assert_near(second.logits, wanted)
