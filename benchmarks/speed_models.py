"""The models that the speed benchmarks run, and the maps on them: ten values with 200 neurons each.

Where only the time counts, weights and edits are random: kernels take as long whatever the numbers are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache, StaticCache

from neva_hf import NeuronMap, NeVAConfig, NeVAModel, load_base, load_value_system
from neva_hf.architectures import describe_base, find_down_projections
from neva_hf.module_edits import ModuleEdits
from neva_hf.projection import layer_sizes

NEURONS = 200  # of each value, over all layers

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    },
}
"""Models of random weights by name."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def model_named(name: str | None, device: torch.device, dtype: torch.dtype, **sizes: Any) -> Any:
    """A model of one of the [`SHAPES`] with random weights, or a real one.

    Args:
        name (`str`, *optional*): One of the shapes, or what [`load_base`] takes.
        device (`torch.device`): Where it is made.
        dtype (`torch.dtype`): What it computes in.
        sizes (`Any`): In place of sizes of the shape.

    Returns:
        `PreTrainedModel`: In evaluation mode; its weights want no gradients.
    """
    if name not in SHAPES:
        return load_base(name, device=str(device), dtype=dtype)[0].requires_grad_(False)
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(LlamaConfig(**{**SHAPES[name], **sizes}))
    finally:
        torch.set_default_dtype(before)
    return model.to(device).eval().requires_grad_(False)


def random_map(
    base: nn.Module, *, neurons: int = NEURONS, gain: bool = False, gate: bool = False, seed: int = 0
) -> NeuronMap:
    """A map of Schwartz's ten values, each on neurons of its own somewhere in the model, with small random edits.

    Args:
        base (`nn.Module`): The model.
        neurons (`int`): How many neurons each value edits, over all layers.
        gain (`bool`): Whether edits have gains.
        gate (`bool`): Whether they have gates, which read all neurons that the layer's edits name.
        seed (`int`): For the random numbers.

    Returns:
        [`NeuronMap`]: The map.
    """
    values = [value.name for value in load_value_system("schwartz10").values]
    generator = torch.Generator().manual_seed(seed)
    sizes = {name: layer_sizes(module)[0] for name, module in find_down_projections(base).items()}
    names, width = list(sizes), next(iter(sizes.values()))
    # (each neuron of the model by one number: layer * width + feature)
    picked = torch.stack([torch.randperm(len(names) * width, generator=generator)[:neurons] for _ in values])
    modules = {}
    for layer, name in enumerate(names):
        here = picked // width == layer
        index = (picked[here] % width).unique()
        if not len(index):
            continue
        edited = torch.stack([torch.isin(index, row[where] % width) for row, where in zip(picked, here, strict=True)])

        def small(*shape: int) -> torch.Tensor:
            return 0.05 * torch.randn(*shape, generator=generator)

        modules[name] = ModuleEdits(
            index=index.to(torch.int32),
            shift=small(*edited.shape) * edited,
            gain=small(*edited.shape) * edited if gain else None,
            gate_weight=small(*edited.shape) if gate else None,
            gate_bias=small(len(values)) if gate else None,
        )
    config = NeVAConfig(values=values, use_gain=gain, use_gate=gate, base=describe_base(base))
    return NeuronMap(config, modules)


def twin(base: Any) -> Any:
    """A model of its own that shares the weights of another, so that many fit beside each other."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in [*base.parameters(), *base.buffers()]}
    return copy.deepcopy(base, shared)


def edited_twin(base: Any, neuron_map: NeuronMap) -> NeVAModel:
    """A twin with a map on it."""
    return neuron_map.apply_to(twin(base))


def inner(model: Any) -> Any:
    """The model of transformers inside, which `generate` runs at every step."""
    return model.base_model.model if isinstance(model, NeVAModel) else model


def mixtures(values: list[str], rows: int) -> list[dict[str, float]]:
    """Strengths of all values for each row, eight kinds of mixtures in turn."""
    kinds = [
        {value: round(((3 * kind + 2 * place) % 7 - 3) / 2, 2) for place, value in enumerate(values)}
        for kind in range(8)
    ]
    return [kinds[row % 8] for row in range(rows)]


@dataclass
class Decoder:
    """A model whose key-value cache holds a prompt, ready for decode steps.

    Args:
        forward (`Callable`): The forward pass, compiled or not.
        cache (`DynamicCache` or `StaticCache`): Filled with the prompt.
        token (`torch.Tensor`): What each step is given, `[rows, 1]`.
        prompt (`int`): How many tokens the prompt has.
    """

    forward: Callable[..., Any]
    cache: Any
    token: torch.Tensor
    prompt: int

    @classmethod
    def of(
        cls,
        model: Callable[..., Any],
        ids: torch.Tensor,
        steps: int,
        config: Any,
        *,
        static: bool = False,
        forward: Callable[..., Any] | None = None,
    ) -> Decoder:
        """Runs the prompt.

        Args:
            model (`Callable`): What runs the prompt.
            ids (`torch.Tensor`): The prompts, `[rows, tokens]`.
            steps (`int`): How many steps a static cache leaves room for.
            config (`PreTrainedConfig`): The model's configuration.
            static (`bool`): Whether to use a static cache.
            forward (`Callable`, *optional*): The forward pass of the steps, the same when `None`.
        """
        with torch.inference_mode(False), torch.no_grad():
            room = ids.shape[1] + steps
            cache = StaticCache(config=config, max_cache_len=room) if static else DynamicCache(config=config)
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cls(model if forward is None else forward, cache, ids[:, -1:].clone(), ids.shape[1])

    def step(self) -> torch.Tensor:
        """One more token of each row: logits `[rows, 1, vocabulary]`."""
        output = self.forward(input_ids=self.token, past_key_values=self.cache, use_cache=True)
        logits: torch.Tensor = output.logits
        return logits

    def rewind(self) -> None:
        """Forgets all tokens after the prompt."""
        if not isinstance(self.cache, StaticCache):
            extra = self.cache.get_seq_length() - self.prompt
            if extra:
                self.cache.crop(-extra)
            return
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.prompt)

    def run(self, steps: int) -> None:
        """Some decode steps, after which the cache is as before."""
        with torch.no_grad():
            for _ in range(steps):
                self.step()
            self.rewind()
