"""What the Space tells of dials and neurons."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from space_tools import base_model, tiny_engine, tokenizer
from tiny import ARCHITECTURES, random_map, tiny_model
from torch.func import jvp

from neva_hf import NeVAError
from neva_hf.architectures import decoder_blocks, find_down_projections
from neva_hf.identify.dose import expected, leakage
from neva_hf.space import insight
from neva_hf.space.engine import Engine
from neva_hf.space.unembed import token_logits, tokens_of

SEEN = ["power", "security", "benevolence", "hedonism"]
MARGINS = {
    "power": [[-0.3, 0.3, 0.5], [0.1, 0.1, 0.1], [0.06, -0.06, -0.1], [0.0, 0.03, 0.1]],
    "security": [[0.1, -0.1, -0.2], [-0.2, 0.2, 0.4], [0.0, 0.04, 0.1], [-0.02, 0.02, 0.0]],
    "benevolence": [[0.0] * 3] * 4,
}
KL = {"power": [0.05, 0.05, 0.2], "security": [0.04, 0.06, 0.3], "benevolence": [0.05, 0.05, 0.2]}
DOSE: dict[str, Any] = {
    "strengths": [-1.0, 1.0, 2.0],
    "curves": {name: {"kl": KL[name], "margins": dict(zip(SEEN, MARGINS[name], strict=True))} for name in KL},
}


def dosed(dose: Any = DOSE) -> Engine:
    return tiny_engine(measurements={"dose": dose})


@pytest.mark.parametrize("strength", [-1.5, -0.5, 0.4, 1.0, 2.0])
def test_one_dial_is_expected_to_do_what_its_curve_says(strength: float) -> None:
    found, curve = insight.expected_of(dosed(), {"power": strength}), expected(DOSE, "power", strength)
    assert found is not None
    assert found.control == {"power": curve.margins["power"]}
    assert found.others == {name: curve.margins[name] for name in SEEN if name != "power"}
    assert found.kl == curve.kl
    assert found.leakage == pytest.approx(leakage(curve.margins, "power", strength))


def test_several_dials_add_up() -> None:
    found = insight.expected_of(dosed(), {"power": 1.0, "security": -1.0})
    assert found is not None
    assert found.control == pytest.approx({"power": 0.3 + 0.1, "security": 0.1 - 0.2})
    assert found.others == pytest.approx({"benevolence": -0.06, "hedonism": 0.03 - 0.02})
    assert found.kl == pytest.approx(0.05 + 0.04)
    # Power leaks 0.03 onto hedonism, security 0.02 (a fall of both); both together reach 0.3 + 0.2.
    assert found.leakage == pytest.approx((0.03 + 0.02) / 2 / (0.3 + 0.2))


def test_the_dose_is_told_as_the_strength_of_one_dial() -> None:
    found = insight.expected_of(dosed(), {"power": 2.0})
    assert found is not None
    assert found.strength == pytest.approx(2.0)


def test_dials_at_rest_do_nothing() -> None:
    found = insight.expected_of(dosed(), {"power": 0.0})
    assert found == insight.Expected({}, dict.fromkeys(SEEN, 0.0), None, 0.0, 0.0, ())


def test_nothing_leaks_from_a_dial_that_does_not_reach_its_value() -> None:
    found = insight.expected_of(dosed(), {"benevolence": 1.0})
    assert found is not None
    assert found.leakage is None


def test_dials_beyond_what_was_measured_are_named() -> None:
    found = insight.expected_of(dosed(), {"power": 2.1, "security": -1.1, "benevolence": -1.0})
    assert found is not None
    assert found.beyond == ("power", "security")


def damaged(**changes: Any) -> dict[str, Any]:
    return {**DOSE, "curves": {**DOSE["curves"], "power": {**DOSE["curves"]["power"], **changes}}}


@pytest.mark.parametrize(
    "dose",
    [
        None,
        {},
        [],
        "curves",
        {"strengths": [1.0], "curves": {}},
        {**DOSE, "strengths": [2.0, 1.0, -1.0]},
        {**DOSE, "curves": {"power": 3}},
        damaged(kl="much"),
        damaged(kl=[0.1]),
        damaged(margins=[]),
        damaged(margins={"power": ["a", 1, 2]}),
        damaged(margins={"power": [1e308] * 3, "security": [1e308] * 3, "benevolence": [1e308] * 3}),
    ],
)
def test_a_map_without_sound_curves_expects_nothing(dose: Any) -> None:
    assert insight.expected_of(dosed(dose), {"power": 1.0, "security": 1.0}) is None


def test_names_in_curves_that_are_no_values_are_left_out() -> None:
    found = insight.expected_of(dosed(damaged(margins={"power": [0.1] * 3, "<script>": [1.0] * 3})), {"power": 1.0})
    assert found is not None
    assert {**found.control, **found.others} == {"power": pytest.approx(0.1)}


def test_dials_that_there_are_not_have_no_effect_to_tell() -> None:
    with pytest.raises(NeVAError, match="no value 'luck'"):
        insight.expected_of(dosed(), {"luck": 1.0})


def sparse_engine(**options: Any) -> Engine:
    """Every value edits some neurons only, strength 1 is half an edit of power, and only security has gains, if any."""
    base = base_model()
    units = {"power": [1.0, 0.5]}
    neuron_map = random_map(base, units=units, **options)
    for number, edits in enumerate(neuron_map.modules.values()):
        edits.shift[0, :3] = 0
        edits.shift[1, 2 + number :] = 0
        if edits.gain is not None:
            edits.gain[:2] = 0
    return Engine.of(base, tokenizer(), neuron_map)


@pytest.mark.parametrize("gain", [False, True])
def test_layers_hold_the_neurons_of_a_value_and_what_strength_1_adds(gain: bool) -> None:
    engine = sparse_engine(gain=gain)
    for value in engine.values:
        found = insight.layers(engine, value)
        assert {one.module: one.index for one in found} == {
            name: index.tolist() for name, index in engine.map.neurons(value).items()
        }
        for one in found:
            edits = engine.map.modules[one.module]
            row, unit = engine.map.values.index(value), 0.5 if value == "power" else 1.0
            gains = torch.zeros_like(edits.shift) if edits.gain is None else edits.gain
            for index, shift, added in zip(one.index, one.shift, one.gain, strict=True):
                assert shift == pytest.approx(unit * float(edits.shift[row, edits.index == index]))
                assert added == pytest.approx(unit * float(gains[row, edits.index == index]))
        assert [one.layer for one in found] == sorted(one.layer for one in found)
        assert {one.size for one in found} == {64}
    with pytest.raises(NeVAError, match="no value 'luck'"):
        insight.layers(engine, "luck")


def test_overlap_is_that_of_the_map() -> None:
    engine = sparse_engine()
    wanted, found = engine.map.overlap(), insight.overlap(engine)
    for row, one in enumerate(engine.values):
        assert found[row] == pytest.approx([wanted[one, other] for other in engine.values])
    assert len({share for row in found for share in row}) > 2


def test_a_neuron_is_told_with_its_shifts_and_its_place_among_the_values_neurons() -> None:
    engine = sparse_engine()
    facts = [
        insight.neuron(engine, name, int(index)) for name, edits in engine.map.modules.items() for index in edits.index
    ]
    for value in engine.values:
        of_value = [one for one in facts if value in one.shift]
        assert {(one.module, one.index) for one in of_value} == {
            (layer.module, index) for layer in insight.layers(engine, value) for index in layer.index
        }
        assert sorted(one.rank[value] for one in of_value) == list(range(1, len(of_value) + 1))
        strongest = min(of_value, key=lambda one: one.rank[value])
        assert strongest.score[value] == 1.0
        for one in of_value:
            weight = engine.base.get_submodule(one.module).weight.detach()
            other = engine.base.get_submodule(strongest.module).weight.detach()[:, strongest.index]
            written = abs(one.shift[value]) * weight[:, one.index].norm()
            assert one.score[value] == pytest.approx(
                float(written / (abs(strongest.shift[value]) * other.norm())), rel=1e-4
            )


def gained_engine() -> Engine:
    """Of power, some neurons have a shift alone, some a gain alone, most both; strength 1 is half an edit."""
    base = base_model()
    neuron_map = random_map(base, gain=True, units={"power": [1.0, 0.5]})
    for edits in neuron_map.modules.values():
        assert edits.gain is not None
        edits.shift[1, 0], edits.gain[1, 1] = 0, 0
    return Engine.of(base, tokenizer(), neuron_map)


def test_a_neuron_is_told_with_its_gain_and_counts_by_what_shift_and_gain_write() -> None:
    engine = gained_engine()
    written = {}
    for module, edits in engine.map.modules.items():
        assert edits.gain is not None
        for place, index in enumerate(edits.index.tolist()):
            facts = insight.neuron(engine, module, index)
            shift, gain = (float(part[1, place]) for part in (edits.shift, edits.gain))
            assert (facts.shift["power"], facts.gain["power"]) == pytest.approx((shift / 2, gain / 2))
            length = float(engine.base.get_submodule(module).weight.detach()[:, index].norm())
            written[module, index] = (
                abs(shift) * length,
                abs(gain) * length,
                facts.score["power"],
                facts.rank["power"],
            )
    most = [max(one[part] for one in written.values()) for part in (0, 1)]
    sums = {key: one[0] / most[0] + one[1] / most[1] for key, one in written.items()}
    order = sorted(sums, key=lambda key: -sums[key])
    assert [written[key][3] for key in order] == list(range(1, len(order) + 1))
    for key, one in written.items():
        assert one[2] == pytest.approx(sums[key] / sums[order[0]], rel=1e-4)


def test_a_value_without_gains_is_told_as_if_the_map_had_none() -> None:
    engine, plain = sparse_engine(gain=True), sparse_engine()
    for edits, own in zip(engine.map.modules.values(), plain.map.modules.values(), strict=True):
        own.index.copy_(edits.index)
        own.shift.copy_(edits.shift)
    for module, edits in engine.map.modules.items():
        for index in edits.index.tolist():
            here, there = insight.neuron(engine, module, index), insight.neuron(plain, module, index)
            for value in {"benevolence", "power"} & there.shift.keys():
                assert (here.shift[value], here.gain[value]) == (there.shift[value], 0.0)
                assert (here.score[value], here.rank[value]) == (there.score[value], there.rank[value])


@pytest.mark.parametrize(("module", "index"), [("model.layers.0.mlp.down_proj", -1), ("lm_head", 0), ("", 0)])
def test_neurons_that_the_map_does_not_edit_are_not_told(module: str, index: int) -> None:
    with pytest.raises(NeVAError, match="does not edit that neuron"):
        insight.neuron(tiny_engine(), module, index)


def final_norm_of(model: Any) -> Any:
    """What runs behind the last block, found by watching a forward pass."""
    _, blocks = decoder_blocks(model)
    seen: list[Any] = []
    handles = [
        module.register_forward_hook(lambda module, *_: seen.append(module))
        for module in model.modules()
        if "norm" in type(module).__name__.lower() or module is blocks[-1]
    ]
    model(input_ids=torch.tensor([[3, 4]]))
    for handle in handles:
        handle.remove()
    return seen[seen.index(blocks[-1]) + 1]


def pushed(norm: Any, direction: torch.Tensor) -> torch.Tensor:
    """What a small step in a direction does behind a norm, at a place where the norm's own scale does not answer."""
    layer_norm = isinstance(norm, torch.nn.LayerNorm)
    place = torch.randn(len(direction), generator=torch.Generator().manual_seed(5))
    flat = direction - direction.mean() if layer_norm else direction
    place = place - place.mean() if layer_norm else place
    place = place - flat * (place @ flat) / (flat @ flat)
    return jvp(lambda x: norm(x[None, None])[0, 0], (place,), (direction,))[1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_token_logits_are_what_the_models_own_norms_and_head_make_of_a_direction(architecture: str) -> None:
    model = tiny_model(architecture)
    # Norms begin at 1, where leaving one out would go unseen.
    for module in model.modules():
        if "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None:
            torch.nn.init.uniform_(module.weight.data, 0.2, 2.0, torch.Generator().manual_seed(module.weight.numel()))
    _, blocks = decoder_blocks(model)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(4))
    found = token_logits(model, list(find_down_projections(model))[-1], direction)
    with torch.no_grad():
        behind = getattr(blocks[-1], "post_feedforward_layernorm", None)
        written = direction if behind is None else pushed(behind, direction)
        wanted = torch.nn.functional.linear(
            pushed(final_norm_of(model), written), model.get_output_embeddings().weight
        )
    assert torch.cosine_similarity(found, wanted, dim=0) > 0.9999


def test_the_tokens_are_the_ends_of_the_list_without_what_nobody_can_read() -> None:
    engine = tiny_engine()
    reader = tokenizer()
    direction = torch.randn(32, generator=torch.Generator().manual_seed(4))
    module = "model.layers.1.mlp.down_proj"
    logits = token_logits(engine.base, module, direction)
    texts = [reader.decode([token]) for token in logits.argsort(descending=True).tolist()]
    readable = [text for text in texts if text.strip() and "\ufffd" not in text and text != "<|end|>"]
    promoted, suppressed = tokens_of(engine.base, reader, module, direction, 5)
    assert promoted[0] == readable[0]
    assert suppressed[0] == readable[-1]
    assert set(promoted) <= set(readable[:5])
    assert set(suppressed) <= set(readable[-5:])
