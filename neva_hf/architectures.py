"""Where the FFN down projections of an architecture are, and what a map must fit."""

from __future__ import annotations

from typing import Any

from torch import nn

from .errors import NeVAError
from .projection import layer_sizes

# Module name endings of the last projection of a decoder block's feed-forward network. The ones on the left of a pair
# are looked for inside decoder blocks only, so that heads and adapters elsewhere are never taken.
DOWN_PROJECTIONS = (
    "mlp.down_proj",  # Llama, Mistral, Qwen, Gemma, Phi-3, OLMo, Granite, SmolLM, Cohere, StableLM
    "mlp.c_proj",  # GPT-2, GPT-BigCode, Starcoder2, GPT-Neo
    "mlp.dense_4h_to_h",  # GPT-NeoX, Falcon, BLOOM
    "mlp.fc_out",  # GPT-J, CodeGen
    "mlp.fc2",  # Phi
    "fc2",  # OPT, BioGPT, XGLM
    "ffn.down_proj",  # MPT
    "feed_forward.down_proj",  # Llama 4's dense layers, LFM2
    "feed_forward.w2",  # LFM2, InternLM2
)


def text_config(model: nn.Module) -> Any:
    """The config that describes the decoder of a model, also of one that sees images."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks of a causal language model.

    Args:
        model (`nn.Module`): A causal language model of transformers.

    Returns:
        `tuple[str, nn.ModuleList]`: Its name in the model, and the blocks.

    Raises:
        `NeVAError`: If there is no list of as many blocks as the config tells.
    """
    count = getattr(text_config(model), "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and (count is None or len(module) == count)
    ]
    if not lists:
        raise NeVAError(
            f"No list of {count} decoder blocks was found in {type(model).__name__}. Name the FFN down projections "
            "yourself with target_modules=[...]."
        )
    # The outermost of the lists; with several, the one that holds most of the model.
    return max(lists, key=lambda found: sum(parameter.numel() for parameter in found[1].parameters()))


def find_down_projections(model: nn.Module) -> dict[str, nn.Module]:
    """Finds the FFN down projection of every decoder block.

    Args:
        model (`nn.Module`): A causal language model of transformers.

    Returns:
        `dict[str, nn.Module]`: Full module name -> module, in the order of the blocks.

    Raises:
        `NeVAError`: For a mixture of experts, and for architectures that are not known.

    Example:

    ```py
    >>> list(find_down_projections(model))[:2]  # doctest: +SKIP
    ['model.layers.0.mlp.down_proj', 'model.layers.1.mlp.down_proj']
    ```
    """
    blocks_name, blocks = decoder_blocks(model)
    hidden = getattr(text_config(model), "hidden_size", None)
    found: dict[str, nn.Module] = {}
    for number, block in enumerate(blocks):
        where = f"{blocks_name}.{number}"
        modules = dict(block.named_modules())
        for name, module in modules.items():
            refuse_experts(module, f"{where}.{name}")
        for ending in DOWN_PROJECTIONS:
            if ending in modules and hidden in (None, layer_sizes(modules[ending])[1]):
                found[f"{where}.{ending}"] = modules[ending]
                break
        else:
            raise NeVAError(
                f"The FFN down projection of {where} ({type(block).__name__}) was not found: none of "
                f"{', '.join(DOWN_PROJECTIONS)} is there. Name the down projections with target_modules=[...]."
            )
    return found


def refuse_experts(module: nn.Module, name: str) -> None:
    """Raises if a module holds the experts of a mixture, fused or listed.

    Args:
        module (`nn.Module`): The module.
        name (`str`): Its full name, for the message.

    Raises:
        `NeVAError`: If it does.
    """
    # (Convolutions have weights of three dimensions too.)
    fused = [
        key
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and not isinstance(module, nn.modules.conv._ConvNd)
    ]
    listed = name.rsplit(".", 1)[-1] == "experts"
    if fused or listed:
        what = f"in fused tensors ({', '.join(fused)})" if fused else "in a list"
        raise NeVAError(
            f"{name!r} is a mixture of experts: it holds the weights of many experts {what}, and which of their neurons "
            "run changes with every token, so there is no single down projection whose inputs could be edited. Use a "
            "dense model, or name the dense down projections of this one with target_modules=[...]."
        )


def describe_base(model: nn.Module) -> dict[str, Any]:
    """What a map remembers of the shape of its base model, to refuse others.

    Args:
        model (`nn.Module`): A causal language model of transformers, without adapters.

    Returns:
        `dict[str, Any]`: `model_type`, `hidden_size`, `intermediate_size` and `num_hidden_layers`.
    """
    first = next(iter(find_down_projections(model).values()))
    d_ff, hidden = layer_sizes(first)
    return {
        "model_type": getattr(text_config(model), "model_type", type(model).__name__),
        "hidden_size": hidden,
        "intermediate_size": d_ff,
        "num_hidden_layers": len(decoder_blocks(model)[1]),
    }


def check_base(model: nn.Module, base: dict[str, Any] | None, module_names: list[str]) -> None:
    """Refuses a map on a base model that it does not fit.

    Args:
        model (`nn.Module`): The base model.
        base (`dict[str, Any]`, *optional*): What the map remembers, see [`describe_base`].
        module_names (`list[str]`): The modules that the map edits.

    Raises:
        `NeVAError`: If sizes or module names differ; the message says which.
    """
    modules = dict(model.named_modules())
    missing = [name for name in module_names if name not in modules]
    if base is not None:
        here = describe_base(model)
        differing = [
            f"{key} is {here[key]}, the map needs {base[key]}"
            for key in ("hidden_size", "intermediate_size", "num_hidden_layers")
            if key in base and base[key] != here[key]
        ]
        if differing:
            raise NeVAError(
                f"This neuron map was made for another model ({base.get('model_type', 'unknown type')}): in "
                f"{type(model).__name__}, {'; '.join(differing)}. Load the base model that the map names, or make a map "
                "for this one with `neva identify`."
            )
    if missing:
        raise NeVAError(
            f"This neuron map was made for another model: it edits {missing[0]!r}"
            f"{f' and {len(missing) - 1} more modules' if len(missing) > 1 else ''}, which "
            f"{type(model).__name__} does not have (it has, for example, {next(iter(find_down_projections(model)))!r}). "
            "Load the base model that the map names, or make a map for this one with `neva identify`."
        )
