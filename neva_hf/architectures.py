"""Where the FFN down projections of an architecture are, and what a map must fit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from .errors import NeVAError
from .fingerprint import fingerprint, weights_message
from .projection import layer_sizes

# What must be the same in a model for a map to fit it.
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers")
FACTS = ("model_type", *SIZES, "num_attention_heads", "num_key_value_heads", "hidden_act")

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
    lists = list(_outermost_lists(model, count))
    if not lists:
        raise NeVAError(
            f"No list of {count} decoder blocks was found in {type(model).__name__}. Name the FFN down projections "
            "yourself with target_modules=[...]."
        )
    # With several, the one that holds most of the model (which takes a while to find out).
    if len(lists) == 1:
        return lists[0]
    return max(lists, key=lambda found: sum(parameter.numel() for parameter in found[1].parameters()))


def _outermost_lists(module: nn.Module, count: int | None, name: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """The lists of so many modules (of any number when `None`), without those inside them: blocks need no walk."""
    if isinstance(module, nn.ModuleList) and count in (None, len(module)):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _outermost_lists(child, count, f"{name}.{child_name}" if name else child_name)


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
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() == 3 and not isinstance(module, nn.modules.conv._ConvNd)
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
    """What a map remembers of its base model, to refuse others and to know their weights again.

    Args:
        model (`nn.Module`): A causal language model of transformers; adapters on it are looked through.

    Returns:
        `dict[str, Any]`: `model_type`, `hidden_size`, `intermediate_size`, `num_hidden_layers`, and, where the model tells
            them, `num_attention_heads`, `num_key_value_heads`, `hidden_act`, `name`, `revision` (a commit of the Hub) and
            `fingerprint` (see [`~neva_hf.fingerprint.fingerprint`]).
    """
    return describe_architecture(model) | _describe_weights(model)


def _describe_weights(model: nn.Module) -> dict[str, Any]:
    """The part of [`describe_base`] that tells the fine-tunes of a model apart."""
    embeddings_of: Any = getattr(model, "get_input_embeddings", None)
    embeddings = embeddings_of() if embeddings_of is not None else None
    told = {
        "name": getattr(model, "name_or_path", None) or None,
        "revision": getattr(getattr(model, "config", None), "_commit_hash", None),
        "fingerprint": fingerprint(embeddings, decoder_blocks(model)[1]),
    }
    return {key: item for key, item in told.items() if item is not None}


def describe_architecture(model: nn.Module) -> dict[str, Any]:
    """The part of [`describe_base`] that all fine-tunes of a model share."""
    config = text_config(model)
    projections = find_down_projections(model)
    d_ff, hidden = layer_sizes(next(iter(projections.values())))
    optional = {
        key: getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads", "hidden_act")
    }
    return {
        "model_type": getattr(config, "model_type", type(model).__name__),
        "hidden_size": hidden,
        "intermediate_size": d_ff,
        "num_hidden_layers": len(projections),
    } | {key: item for key, item in optional.items() if isinstance(item, (int, str))}


def architecture_differences(
    base: Mapping[str, Any], here: Mapping[str, Any], keys: Sequence[str] = FACTS
) -> list[str]:
    """In what two descriptions of base models differ, in words; what only one of them tells is no difference.

    Args:
        base (`Mapping[str, Any]`): What a map remembers ([`describe_base`]).
        here (`Mapping[str, Any]`): Another such description.
        keys (`Sequence[str]`): What is compared.

    Returns:
        `list[str]`: Such as `"hidden_size is 64, the map needs 32"`.
    """
    return [
        f"{key} is {here[key]}, the map needs {base[key]!s:.80}"
        for key in keys
        if base.get(key) is not None and here.get(key) is not None and base[key] != here[key]
    ]


def check_base(model: nn.Module, base: dict[str, Any] | None, module_names: list[str]) -> None:
    """Refuses a map on a base model of another architecture. Whose weights they are is not looked at.

    Args:
        model (`nn.Module`): The base model.
        base (`dict[str, Any]`, *optional*): What the map remembers, see [`describe_base`].
        module_names (`list[str]`): The modules that the map edits.

    Raises:
        `NeVAError`: If sizes or module names differ; the message says which.
    """
    modules = dict(model.named_modules())
    missing = [name for name in module_names if name not in modules]
    here = {} if base is None else describe_architecture(model)
    # Sizes first: they say more than the names of modules, and these say more than the rest.
    for keys in (SIZES, FACTS):
        differing = architecture_differences(base or {}, here, keys)
        if differing:
            raise NeVAError(
                f"This neuron map was made for another model ({(base or {}).get('model_type', 'unknown type')!s:.80}): in "
                f"{type(model).__name__}, {'; '.join(differing)}. Load the base model that the map names, or make a map "
                "for this one with `neva identify`."
            )
        if missing:
            raise NeVAError(
                f"This neuron map was made for another model: it edits {missing[0]!r:.600}"
                f"{f' and {len(missing) - 1} more modules' if len(missing) > 1 else ''}, which "
                f"{type(model).__name__} does not have (it has, for example, {next(iter(find_down_projections(model)))!r})."
                " Load the base model that the map names, or make a map for this one with `neva identify`."
            )


def warn_of_weights(model: nn.Module, base: dict[str, Any] | None) -> None:
    """Warns where a map is put on weights that it was not made on, such as a fine-tune's.

    Args:
        model (`nn.Module`): A base model that [`check_base`] let pass.
        base (`dict[str, Any]`, *optional*): What the map remembers. Without a fingerprint nothing is known.
    """
    if base is None or base.get("fingerprint") is None:
        return
    message = weights_message(base, _describe_weights(model))
    if message is not None:
        warnings.warn(message, UserWarning, stacklevel=2)
