"""A map knows the base model that it was made for: other architectures are refused, other weights are warned of."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import ARCHITECTURES, random_map, tiny_model
from torch import nn
from transformers import PreTrainedModel

from neva_hf import NeuronMap, NeVAConfig, NeVAError, NeVAModel
from neva_hf.architectures import describe_base
from neva_hf.fingerprint import SAMPLES, distance, verdict

# Wide enough for the blocks of 32 that GGUF quantizes in.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


def named(model: PreTrainedModel, name: str) -> PreTrainedModel:
    model.name_or_path = name
    return model


def changed(model: PreTrainedModel, part: float, name: str = "someone/tuned") -> PreTrainedModel:
    """A copy whose matrices are moved by a part of their size, as a fine-tune moves them."""
    tuned = named(copy.deepcopy(model), name)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in tuned.parameters():
            if weight.dim() == 2:
                weight += part * weight.std() * torch.randn(weight.shape, generator=generator)
    return tuned


def quantized(model: PreTrainedModel, kind: GGMLQuantizationType) -> PreTrainedModel:
    """A copy as it comes back from a GGUF file."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for weight in copied.parameters():
            if weight.dim() == 2:
                weight.copy_(torch.from_numpy(dequantize(quantize(weight.numpy(), kind), kind)))
    return copied


def fingerprint(model: nn.Module) -> dict[str, Any]:
    return describe_base(model)["fingerprint"]


def messages(load: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        load()
    return [str(one.message) for one in seen if "This neuron map was made on" in str(one.message)]


# What a fingerprint tells.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_has_a_fingerprint_that_tells_its_weights_from_others(architecture: str) -> None:
    here, there = (fingerprint(tiny_model(architecture, seed)) for seed in (0, 1))
    assert verdict(here, fingerprint(tiny_model(architecture))) == "same"
    assert distance(here, here) == 0
    assert verdict(here, there) == "unrelated"
    # Embeddings, and both blocks with attention and feed-forward matrices.
    assert {name.split(".")[0] for name in here["weights"]} == {"embeddings", "0", "1"}
    assert len(here["weights"]) >= 9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_precision_does_not_matter(dtype: torch.dtype) -> None:
    model = tiny_model(**WIDE)
    assert verdict(fingerprint(model), fingerprint(copy.deepcopy(model).to(dtype))) == "same"


@pytest.mark.parametrize(("kind", "most"), [("Q8_0", 0.012), ("Q5_0", 0.06), ("Q4_0", 0.13)])
def test_a_copy_from_a_gguf_file_differs_slightly(kind: str, most: float) -> None:
    model = tiny_model(**WIDE)
    other = fingerprint(quantized(model, GGMLQuantizationType[kind]))
    assert 0.003 < (distance(fingerprint(model), other) or 0) < most
    assert verdict(fingerprint(model), other) == "slightly different"


@pytest.mark.parametrize(
    ("part", "expected"), [(0.0005, "same"), (0.02, "slightly different"), (0.3, "different"), (3.0, "unrelated")]
)
def test_the_distance_is_how_far_the_weights_were_moved(part: float, expected: str) -> None:
    model = tiny_model(**WIDE)
    found = fingerprint(changed(model, part))
    assert verdict(fingerprint(model), found) == expected
    if part >= 0.02:
        assert distance(fingerprint(model), found) == pytest.approx(part, rel=0.25)


def test_one_tuned_block_is_enough_to_be_seen() -> None:
    model = tiny_model(**WIDE)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.model.layers[1].self_attn.q_proj.weight *= 1.5
    assert verdict(fingerprint(model), fingerprint(tuned)) == "slightly different"


def test_adapters_are_looked_through() -> None:
    plain = describe_base(tiny_model())
    neva = random_map(tiny_model()).apply_to(tiny_model())
    lora = get_peft_model(tiny_model(), LoraConfig(target_modules=["down_proj", "q_proj", "embed_tokens"]))
    for wrapped in (neva.base_model.model, lora.base_model.model):
        assert describe_base(wrapped) == plain


def test_a_longer_vocabulary_is_no_difference() -> None:
    model = tiny_model(vocab_size=2000)
    longer = copy.deepcopy(model)
    longer.resize_token_embeddings(2100)
    assert verdict(fingerprint(model), fingerprint(longer)) == "same"


def test_weights_that_cannot_be_read_are_unknown() -> None:
    model = tiny_model()
    assert "fingerprint" not in describe_base(copy.deepcopy(model).to("meta"))
    packed = copy.deepcopy(model)
    for module in packed.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().to(torch.int8), requires_grad=False)
    # The embeddings are left, as most quantization leaves them.
    assert set(fingerprint(packed)["weights"]) == {"embeddings"}
    assert verdict(fingerprint(model), fingerprint(packed)) == "same"
    assert verdict(None, fingerprint(model)) == "unknown"
    assert verdict({"version": 2}, fingerprint(model)) == "unknown"


def test_a_fingerprint_takes_less_room_than_the_values_of_one_map() -> None:
    assert len(json.dumps(describe_base(tiny_model(**WIDE)))) < 3000


def test_the_embedded_base_has_a_fingerprint(embedded_base: Any) -> None:
    told = describe_base(embedded_base[0])
    assert told["name"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert len(told["fingerprint"]["weights"]) == 22
    assert verdict(told["fingerprint"], fingerprint(copy.deepcopy(embedded_base[0]).to(torch.bfloat16))) == "same"


# What is refused and what is warned of.


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"num_attention_heads": 8, "head_dim": 4}, "num_attention_heads is 8, the map needs 4"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1, the map needs 2"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu, the map needs silu"),
    ],
)
def test_a_model_of_the_same_sizes_and_another_architecture_is_refused(overrides: dict[str, Any], says: str) -> None:
    neuron_map = random_map(tiny_model())
    with pytest.raises(NeVAError, match=rf"made for another model \(llama\): in LlamaForCausalLM, {says}\. Load the"):
        neuron_map.apply_to(tiny_model(**overrides))


def test_another_type_with_the_same_modules_and_sizes_is_refused() -> None:
    neuron_map = random_map(tiny_model("llama"))
    with pytest.raises(NeVAError, match="in MistralForCausalLM, model_type is mistral, the map needs llama"):
        neuron_map.apply_to(tiny_model("mistral"))


def by_neva(base: PreTrainedModel, folder: Path) -> Any:
    return NeVAModel.from_pretrained(base, folder)


def by_peft(base: PreTrainedModel, folder: Path) -> Any:
    return PeftModel.from_pretrained(base, str(folder))


def by_transformers(base: PreTrainedModel, folder: Path) -> Any:
    return base.load_adapter(str(folder))


each_way = pytest.mark.parametrize("load", [by_neva, by_peft, by_transformers])


@each_way
def test_a_fine_tune_is_warned_of_once_and_by_both_names(load: Any, tmp_path: Path) -> None:
    base = named(tiny_model(), "someone/base")
    random_map(base).save_pretrained(tmp_path)
    tuned = changed(base, 0.3)
    (said,) = messages(lambda: load(tuned, tmp_path))
    assert "was made on 'someone/base', and the weights of 'someone/tuned' are different (by " in said
    assert "as those of a fine-tune" in said
    assert "neva identify" in said


def test_unrelated_weights_are_warned_of_more_strongly() -> None:
    neuron_map = random_map(named(tiny_model(), "someone/base"))
    (said,) = messages(lambda: neuron_map.apply_to(named(tiny_model(seed=1), "someone/other")))
    assert "'someone/other' are unrelated" in said
    assert "The edits will mean nothing here" in said


def test_slightly_different_weights_are_warned_of_only_under_another_name() -> None:
    base = named(tiny_model(**WIDE), "someone/base")
    neuron_map = random_map(base)
    copied = quantized(base, GGMLQuantizationType.Q4_0)
    assert messages(lambda: neuron_map.apply_to(named(copied, "someone/base"))) == []
    (said,) = messages(lambda: neuron_map.apply_to(named(copy.deepcopy(changed(base, 0.02)), "someone/tuned")))
    assert "slightly different" in said
    assert "another precision or of a light fine-tune" in said


@each_way
def test_the_right_base_is_not_warned_of(load: Any, tmp_path: Path) -> None:
    base = named(tiny_model(), "someone/base")
    random_map(base).save_pretrained(tmp_path)
    assert messages(lambda: load(named(tiny_model(), "/somewhere/else"), tmp_path)) == []


@each_way
def test_maps_without_a_fingerprint_still_load_and_say_nothing(load: Any, tmp_path: Path) -> None:
    sizes = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers")
    old = {key: describe_base(tiny_model())[key] for key in sizes}
    random_map(tiny_model(), base=old).save_pretrained(tmp_path)
    assert messages(lambda: load(tiny_model(seed=1), tmp_path)) == []


def test_the_published_maps_of_before_still_load() -> None:
    for folder in sorted((Path(__file__).parent.parent / "model_cards").glob("*/adapter_config.json")):
        assert len(NeuronMap.from_pretrained(folder.parent).values) == 10


# Fingerprints from strangers.

GOOD = describe_base(tiny_model())["fingerprint"]


@pytest.mark.parametrize(
    "bad",
    [
        "x",
        [],
        {},
        {"version": "1"},
        {"version": 1},
        {"version": 1, "weights": {}},
        {"version": 1, "weights": []},
        {"version": 1, "weights": {str(number): GOOD["weights"]["embeddings"] for number in range(200)}},
        *(
            {"version": 1, "weights": {"embeddings": text}}
            for text in ("", "x", 5, None, "AAAA", "é" * 88, "A" * 9999)
        ),
        # NaN in every place.
        {"version": 1, "weights": {"embeddings": "wH/Af8B/" * (SAMPLES // 4) + "wH/Af8B/wH/Af8B/wH/Af8B/"}},
    ],
)
def test_a_damaged_fingerprint_is_refused(bad: Any) -> None:
    with pytest.raises(NeVAError, match=r"`base\['fingerprint'\]` must"):
        NeVAConfig(values=["power"], base={"fingerprint": bad})


def test_a_fingerprint_of_a_later_version_is_let_pass() -> None:
    neuron_map = random_map(tiny_model(), base={"fingerprint": {"version": 2, "weights": "other"}})
    assert messages(lambda: neuron_map.apply_to(tiny_model(seed=1))) == []


@pytest.mark.parametrize(
    ("key", "bad"),
    [("hidden_size", 0), ("hidden_size", "32"), ("num_hidden_layers", True), ("model_type", 5), ("name", "x" * 513)],
)
def test_facts_of_the_base_that_cannot_be_true_are_refused(key: str, bad: Any) -> None:
    with pytest.raises(NeVAError, match=rf"`base\['{key}'\]` must be"):
        NeVAConfig(values=["power"], base={key: bad})
