"""A llama.cpp control vector: one direction per decoder block, added to what the block writes to the residual stream.

Invariant: a shift of a down projection's output is written only where it reaches the residual stream as it is. It does
in blocks that add the feed-forward network's output to the stream and nothing else (Llama, Qwen; also beside a parallel
attention). It does not where a norm follows the network (Gemma 2 and 3). Known architectures are listed, and each
export is computed as llama.cpp computes it, from the numbers read back, and compared with the live model.

What gains add depends on the token, so it goes into a LoRA adapter beside the control vector, see [`gguf_lora`].
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from neva_hf.architectures import decoder_blocks, find_down_projections, text_config
from neva_hf.errors import NeVAError
from neva_hf.strengths import Strengths

from .check import Check, reference
from .fixed import FixedEdit, bare_twin, fixed_edits, fixed_strengths, gain_factors
from .gguf_lora import forget_adapter, gain_hook, lora_file, read_adapter, write_adapter
from .output import check_output_file, new_file
from .result import Export, Origin
from .stock import base_name

# Model type in transformers -> architecture in llama.cpp, where its graph adds control vectors after the whole block and
# the block adds the network's output to the residual stream unchanged.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "phi3": "phi3",
    "gpt2": "gpt2",
    "starcoder2": "starcoder2",
    "bloom": "bloom",
    "olmo": "olmo",
    "gpt_neox": "gptneox",
    "falcon": "falcon",
    "phi": "phi2",
}
# How norms behind a feed-forward network are called (Gemma 2 and 3, OLMo 2, GLM-4).
_NORMS_BEHIND = ("post_feedforward_layernorm", "post_mlp_layernorm")
_ELSE = "Use `neva export stock`, or `neva export merge` where the architecture can hold the edit."


def export_gguf(
    model: nn.Module,
    output: str | os.PathLike[str],
    strengths: Strengths | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    source: str | None = None,
    prompts: Sequence[str] | None = None,
    tolerance: float | None = None,
    force: bool = False,
) -> Export:
    """Writes what a model does at fixed strengths as a control vector for llama.cpp, and gains as a LoRA adapter beside it.

    llama.cpp adds it to any GGUF of the same base model, whatever its quantization, by
    `llama-cli -m base.gguf --control-vector output.gguf`. Where neurons have gains, a second file `output-lora.gguf` holds
    them, and `--lora output-lora.gguf` has to be said as well.

    Args:
        model ([`NeVAModel`] or `nn.Module`): A model with NeVA layers; it is not changed. Do not train it meanwhile.
        output (`str` or `os.PathLike`): The file to make, which ends in `.gguf`; the adapter is put beside it.
        strengths (`dict[str, float]`, *optional*): Value -> strength. `None` takes those that are set on the model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Its tokenizer; `model.tokenizer` when `None`.
        source (`str`, *optional*): The neuron map's repository or folder, for the note of where the export came from.
        prompts (`Sequence[str]`, *optional*): Questions to compare on; `CHECK_PROMPTS` when `None`.
        tolerance (`float`, *optional*): The largest difference of a logit, see [`reference`].
        force (`bool`): Whether a file that is there is replaced.

    Returns:
        [`Export`]: Where it is, where the adapter is if there is one, and the largest difference of a logit.

    Raises:
        `NeVAError`: For gates, shifts in the first block (llama.cpp has no direction for it), architectures whose blocks do
            more with the edit than add it, a file that is there, or an export that is off.

    Example:

    ```py
    >>> from neva_hf.export import export_gguf
    >>> export_gguf(model, "kind.gguf", {"benevolence": 1.0}).check.difference < 1e-3  # doctest: +SKIP
    True
    ```
    """
    file = check_output_file(output, ".gguf", force)
    if importlib.util.find_spec("gguf") is None:
        raise NeVAError("Writing a control vector needs the package `gguf`. Run `pip install 'neva-hf[cli]'`.")
    kept = fixed_strengths(model, strengths)
    edits = fixed_edits(model, kept)
    beside = lora_file(file)
    twin = bare_twin(model)
    architecture = _architecture(twin)
    written, factors = directions(twin, edits), adapter_factors(twin, edits)
    if factors:
        check_output_file(beside, ".gguf", force)
    expected = reference(model, tokenizer, kept, prompts, tolerance)
    origin = Origin(source, base_name(model), kept)
    with ExitStack() as unfinished:
        vector = unfinished.enter_context(new_file(file))
        _write(vector, architecture, written, origin)
        read = {}
        if factors:
            adapter = unfinished.enter_context(new_file(beside))
            write_adapter(adapter, architecture, factors, origin)
            read = read_adapter(adapter)
        check = _check(twin, read_directions(vector), read, expected)
    if not factors and force:
        forget_adapter(beside)
    return Export("gguf", file, kept, check, adapter=beside if factors else None)


def directions(base: Any, edits: Mapping[str, FixedEdit]) -> dict[int, torch.Tensor]:
    """What each decoder block adds to the residual stream.

    Args:
        base ([`~transformers.PreTrainedModel`]): The base model, without NeVA layers.
        edits (`Mapping[str, FixedEdit]`): Down projection -> its edit; only the shifts are taken.

    Returns:
        `dict[int, torch.Tensor]`: Number of the block, from 0 -> float32 `[hidden]`, in order. Without any shift, the
        second block has a direction of zeros, since llama.cpp loads no control vector without directions.

    Raises:
        `NeVAError`: If an edited module is no FFN down projection of a block, or one in the first is shifted.
    """
    numbers = _numbers(base, edits)
    found = {numbers[name]: edit.shift for name, edit in edits.items() if edit.shifts}
    if 0 in found:
        raise NeVAError(
            "This map shifts the first decoder block, and llama.cpp's control vectors begin with the second. Make a map "
            f"of later layers, or: {_ELSE[:1].lower()}{_ELSE[1:]}"
        )
    return dict(sorted(found.items())) or {1: torch.zeros_like(next(iter(edits.values())).shift)}


def adapter_factors(base: Any, edits: Mapping[str, FixedEdit]) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """What gains add in each decoder block, as products of low rank.

    Args:
        base ([`~transformers.PreTrainedModel`]): The base model, without NeVA layers.
        edits (`Mapping[str, FixedEdit]`): Down projection -> its edit; only the gains are taken.

    Returns:
        `dict[int, tuple[torch.Tensor, torch.Tensor]]`: Number of the block, from 0 -> float32 `[k, d_ff]` and
        `[hidden, k]`, in order, without blocks that have no gains.
    """
    numbers = _numbers(base, edits)
    scaled = {numbers[name]: name for name, edit in edits.items() if edit.scale is not None}
    return {n: gain_factors(base.get_submodule(name), edits[name]) for n, name in sorted(scaled.items())}


def read_directions(file: Path) -> dict[int, torch.Tensor]:
    """Reads a control vector.

    Args:
        file (`pathlib.Path`): A GGUF.

    Returns:
        `dict[int, torch.Tensor]`: Number of the block -> float32 `[hidden]`.
    """
    from gguf import GGUFReader

    return {
        int(tensor.name.removeprefix("direction.")): torch.from_numpy(tensor.data.copy())
        for tensor in GGUFReader(file).tensors
    }


def _numbers(base: Any, edits: Mapping[str, FixedEdit]) -> dict[str, int]:
    """The decoder block of each edited module, from 0.

    Raises:
        `NeVAError`: If one is no FFN down projection of a block.
    """
    blocks, known = decoder_blocks(base)[0], find_down_projections(base)
    strange = [name for name in edits if name not in known]
    if strange:
        raise NeVAError(
            f"This map edits {strange[0]!r}, which is no FFN down projection of a decoder block, so a control vector "
            f"cannot hold it. {_ELSE}"
        )
    return {name: int(name.removeprefix(f"{blocks}.").split(".")[0]) for name in edits}


def _architecture(base: Any) -> str:
    """What llama.cpp calls this architecture.

    Raises:
        `NeVAError`: If a control vector is not known to be exact for it.
    """
    model_type = getattr(text_config(base), "model_type", "")
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    block = decoder_blocks(base)[1][0]
    behind = [name for name in _NORMS_BEHIND if hasattr(block, name)]
    if behind:
        raise NeVAError(
            f"In the decoder blocks of {type(base).__name__} a norm ({behind[0]}) follows the feed-forward network, so "
            f"the edit does not reach the residual stream as a constant, and a control vector would be wrong. Use `neva "
            "export stock`."
        )
    raise NeVAError(
        f"A control vector is not known to be exact for the model type {model_type!r}, only for "
        f"{', '.join(sorted(ARCHITECTURES))}. {_ELSE}"
    )


def _write(file: Path, architecture: str, written: Mapping[int, torch.Tensor], origin: Origin) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(file, "controlvector")
    told = origin.to_dict("gguf")
    writer.add_string("controlvector.model_hint", architecture)
    writer.add_uint32("controlvector.layer_count", len(written))
    writer.add_name("A value edit as a control vector")
    writer.add_description(
        f"The neuron map {told['neuron_map']} on {told['base_model']} at {told['strengths']}, by {told['made_by']}"
    )
    writer.add_string("neva.export", json.dumps(told))
    for number, direction in written.items():
        writer.add_tensor(f"direction.{number}", direction.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check(
    twin: Any,
    directions: Mapping[int, torch.Tensor],
    adapter: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
    expected: Any,
) -> Check:
    """Computes what llama.cpp computes: the base model with the adapter in its down projections, and a direction added
    behind each block.
    """
    blocks, projections = decoder_blocks(twin)[1], list(find_down_projections(twin).values())

    def add(direction: torch.Tensor) -> Any:
        def hook(block: nn.Module, inputs: Any, output: Any) -> Any:
            stream = output[0] if isinstance(output, tuple) else output
            moved = stream + direction.to(stream.device, stream.dtype)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        return hook

    with ExitStack() as hooks:
        for number, direction in directions.items():
            hooks.enter_context(blocks[number].register_forward_hook(add(direction)))
        for number, factors in adapter.items():
            hooks.enter_context(projections[number].register_forward_hook(gain_hook(*factors)))
        what = "The control vector with its LoRA adapter" if adapter else "The control vector"
        return expected.check(twin, what, _ELSE)
