"""Tiny random models of every architecture that is tested, maps for them, and a tokenizer of theirs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from neva_hf import NeuronMap, NeVAConfig, NeVAModel, Scenario
from neva_hf.architectures import describe_base, find_down_projections
from neva_hf.neuron_map import ModuleEdits
from neva_hf.projection import layer_sizes

VOCAB, HIDDEN, D_FF, LAYERS = 96, 32, 64, 2
VALUES = ["benevolence", "power", "security"]
TOKENS = ["<|end|>", *sorted(ByteLevel.alphabet()), "he"]

SCENARIOS = [
    Scenario("What now?", {"power": "take the lead", "security": "stay at home now", "benevolence": "help a friend"}),
    Scenario("Where to?", {"power": "to the top", "security": "home", "benevolence": "to them who need us"}),
    Scenario("Why?", {"security": "it is safe so", "power": "I want it"}),
]
TEXTS = [
    "The rock is dark.",
    "Turn the bike upside down.",
    "Do you have hinges for a door?",
    "Water boils at a hundred.",
]

_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    **_TOKENS,
}
_LLAMA_LIKE: dict[str, Any] = {
    **_COMMON,
    "intermediate_size": D_FF,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_LLAMA_LIKE),
    "qwen2": lambda: Qwen2Config(**_LLAMA_LIKE),
    "qwen3": lambda: Qwen3Config(**_LLAMA_LIKE),
    "mistral": lambda: MistralConfig(**_LLAMA_LIKE, sliding_window=None),
    "gemma2": lambda: Gemma2Config(**_LLAMA_LIKE, query_pre_attn_scalar=8),
    "gemma3": lambda: Gemma3TextConfig(**_LLAMA_LIKE, query_pre_attn_scalar=8),
    "phi3": lambda: Phi3Config(**_LLAMA_LIKE),
    "gpt2": lambda: GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_inner=D_FF, **_TOKENS),
    "opt": lambda: OPTConfig(**_COMMON, ffn_dim=D_FF, word_embed_proj_dim=HIDDEN, max_position_embeddings=128),
    "gpt_neox": lambda: GPTNeoXConfig(**_COMMON, intermediate_size=D_FF, max_position_embeddings=128),
    "falcon": lambda: FalconConfig(**_COMMON, ffn_hidden_size=D_FF, new_decoder_architecture=False),
    "bloom": lambda: BloomConfig(vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=LAYERS, n_head=4, **_TOKENS),
}

ARCHITECTURES = list(CONFIGS)


def tiny_model(architecture: str = "llama", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny random model in float32, with initial weights large enough for its logits to differ."""
    config = CONFIGS[architecture]()
    config.initializer_range = 0.2
    for name, value in overrides.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    # Generation that ends early would compare less.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def tiny_mixture() -> PreTrainedModel:
    torch.manual_seed(0)
    config = MixtralConfig(**_LLAMA_LIKE, num_local_experts=2, num_experts_per_tok=1)
    return AutoModelForCausalLM.from_config(config).eval()


def tiny_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with an end token and no pad token."""
    model = Tokenizer(BPE({token: number for number, token in enumerate(TOKENS)}, [("h", "e")]))
    model.pre_tokenizer = ByteLevel(add_prefix_space=False)
    model.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=model, **{"eos_token": "<|end|>", **special})


def tiny_reader(architecture: str = "llama", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny model that reads what [`tiny_tokenizer`] writes, with room for some hundred characters."""
    sizes = {"vocab_size": len(TOKENS), "max_position_embeddings": 512, **overrides}
    return tiny_model(architecture, seed, **sizes)


def random_map(
    model: PreTrainedModel,
    values: list[str] = VALUES,
    neurons: int = 6,
    gain: bool = False,
    gate: bool = False,
    seed: int = 1,
    size: float = 0.5,
    **config: Any,
) -> NeuronMap:
    """A map of random edits on random neurons of every down projection of a model."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * size

    modules = {}
    for name, module in find_down_projections(model).items():
        d_ff = layer_sizes(module)[0]
        shape = (len(values), neurons)
        modules[name] = ModuleEdits(
            index=torch.randperm(d_ff, generator=generator)[:neurons].to(torch.int32),
            shift=random(*shape),
            gain=random(*shape) if gain else None,
            gate_weight=random(*shape) if gate else None,
            gate_bias=random(shape[0]) if gate else None,
        )
    config.setdefault("base", describe_base(model))
    return NeuronMap(NeVAConfig(values=values, use_gain=gain, use_gate=gate, **config), modules)


def batch(rows: int = 3, tokens: int = 7, padding: str | None = None, seed: int = 2) -> dict[str, torch.Tensor]:
    """Random token ids; with padding, each row is one token shorter than the one before."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    if padding is not None:
        for row in range(rows):
            where = slice(0, row) if padding == "left" else slice(tokens - row, tokens)
            ids[row, where], mask[row, where] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def tiny_pair(
    architecture: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **map_options: Any
) -> tuple[PreTrainedModel, NeVAModel, NeuronMap]:
    """An untouched base model, its twin with a random map on it, and the map."""
    base, twin = (tiny_model(architecture, seed).to(dtype) for _ in range(2))
    neuron_map = random_map(base, **map_options)
    return base, neuron_map.apply_to(twin), neuron_map


def add_map(model: NeVAModel, neuron_map: NeuronMap, adapter_name: str) -> None:
    """Loads one more map into a model, by the way of PEFT."""
    with tempfile.TemporaryDirectory() as folder:
        neuron_map.save_pretrained(folder)
        model.load_adapter(folder, adapter_name)
