"""The FFN down projections of every architecture are found, and can be named by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from test_edit_against_reference import assert_near
from tiny import ARCHITECTURES, D_FF, HIDDEN, LAYERS, batch, tiny_mixture, tiny_model, tiny_pair
from torch import nn

from neva_hf import NeVAConfig, NeVAError
from neva_hf.architectures import decoder_blocks, describe_base, find_down_projections
from neva_hf.dial import neva_layers
from neva_hf.projection import layer_sizes

NAMES = {
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "opt": "model.decoder.layers.{}.fc2",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "falcon": "transformer.h.{}.mlp.dense_4h_to_h",
    "bloom": "transformer.h.{}.mlp.dense_4h_to_h",
}
LLAMA_LIKE = "model.layers.{}.mlp.down_proj"
# BLOOM's FFN is always four times as wide.
WIDTHS = {"bloom": 4 * HIDDEN}

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def names(architecture: str) -> list[str]:
    return [NAMES.get(architecture, LLAMA_LIKE).format(number) for number in range(LAYERS)]


@each_architecture
def test_the_down_projection_of_every_block_is_found(architecture: str) -> None:
    model = tiny_model(architecture)
    found = find_down_projections(model)
    assert list(found) == names(architecture)
    width = WIDTHS.get(architecture, D_FF)
    assert {layer_sizes(module) for module in found.values()} == {(width, HIDDEN)}
    told = describe_base(model)
    assert told["model_type"] == model.config.model_type
    assert (told["hidden_size"], told["intermediate_size"], told["num_hidden_layers"]) == (HIDDEN, width, LAYERS)


@each_architecture
def test_what_is_found_is_the_last_linear_layer_of_the_feed_forward_network(architecture: str) -> None:
    # Its output reaches the residual stream: zero it, and the block's FFN says nothing.
    model = tiny_model(architecture)
    seen: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    with torch.no_grad():
        model(**batch())
    assert seen[-2 if seen[-1].endswith(("lm_head", "embed_out")) else -1] == names(architecture)[-1]


@each_architecture
def test_they_are_found_under_a_map_too(architecture: str) -> None:
    _, model, _ = tiny_pair(architecture)
    assert list(find_down_projections(model.base_model.model)) == names(architecture)
    assert describe_base(model.base_model.model) == describe_base(tiny_model(architecture))


@pytest.mark.parametrize(
    ("target_modules", "layers"),
    [
        (["model.layers.1.mlp.down_proj"], [1]),
        (["layers.0.mlp.down_proj"], [0]),
        (["down_proj"], [0, 1]),
        (r".*\.1\.mlp\.down_proj", [1]),
        (["self_attn.o_proj"], []),
    ],
)
def test_modules_can_be_named_by_hand(target_modules: Any, layers: list[int]) -> None:
    config = NeVAConfig(values=["power"], neurons=3, target_modules=target_modules)
    found = [layer.module_name for layer in neva_layers(get_peft_model(tiny_model(), config))]
    if layers:
        assert found == [LLAMA_LIKE.format(number) for number in layers]
    else:
        assert found == [f"model.layers.{number}.self_attn.o_proj" for number in range(LAYERS)]


@each_architecture
def test_named_by_hand_they_are_edited_the_same(architecture: str) -> None:
    models = []
    for targets in (None, names(architecture)):
        config = NeVAConfig(values=["power"], neurons=3, target_modules=targets)
        model = get_peft_model(tiny_model(architecture), config)
        for layer in neva_layers(model):
            nn.init.constant_(layer.neva_shift["default"], 2.0)
        models.append(model)
    with torch.no_grad():
        first, second = (model(**batch(), strengths={"power": 1.0}).logits for model in models)
    assert_near(first, second)


def test_neurons_named_per_module_choose_the_modules() -> None:
    config = NeVAConfig(values=["power"], neurons={"model.layers.1.mlp.down_proj": 5})
    (layer,) = neva_layers(get_peft_model(tiny_model(), config))
    assert layer.module_name == "model.layers.1.mlp.down_proj"
    assert layer.neva_index["default"].tolist() == [0, 1, 2, 3, 4]


def renamed(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        layer.ffw = layer.mlp
        del layer.mlp
    return model


def test_an_unknown_architecture_says_what_was_looked_for_and_how_to_name_modules() -> None:
    with pytest.raises(
        NeVAError,
        match=r"The FFN down projection of model\.layers\.0 \(LlamaDecoderLayer\) was not found: none of mlp\.down_proj, "
        r".* is there\. Name the down projections with target_modules=\[\.\.\.\]\.",
    ):
        get_peft_model(renamed(tiny_model()), NeVAConfig(values=["power"], neurons=3))


def test_an_unknown_architecture_can_be_named_by_hand() -> None:
    config = NeVAConfig(values=["power"], neurons=3, target_modules=["ffw.down_proj"])
    model = get_peft_model(renamed(tiny_model()), config)
    assert [layer.module_name for layer in neva_layers(model)] == [
        "model.layers.0.ffw.down_proj",
        "model.layers.1.ffw.down_proj",
    ]


def test_a_model_without_decoder_blocks_says_so() -> None:
    with pytest.raises(NeVAError, match=r"No list of None decoder blocks was found in Sequential\. Name the FFN down"):
        decoder_blocks(nn.Sequential(nn.Linear(4, 4)))


def test_a_lookalike_of_another_size_is_not_taken() -> None:
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp.down_proj = nn.Linear(D_FF, HIDDEN + 1)
    with pytest.raises(NeVAError, match="was not found"):
        find_down_projections(model)


def test_the_decoder_blocks_are_the_heaviest_list_of_the_right_length() -> None:
    model = tiny_model()
    model.extra = nn.ModuleList([nn.Linear(2, 2) for _ in range(LAYERS)])
    assert decoder_blocks(model)[0] == "model.layers"


def test_a_mixture_of_experts_has_no_down_projections() -> None:
    with pytest.raises(NeVAError, match="mixture of experts"):
        find_down_projections(tiny_mixture())
