"""A llama.cpp control vector: one direction per decoder block, added to what the block writes to the residual stream.

Invariant: a shift of a down projection's output is written only where it reaches the residual stream as it is. It does
in blocks that add the feed-forward network's output to the stream and nothing else (Llama, Qwen; also beside a parallel
attention). It does not where a norm follows the network (Gemma 2 and 3). Known architectures are listed, and each
export is computed as llama.cpp computes it, from the numbers read back, and compared with the live model.
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
from .fixed import FixedEdit, bare_twin, fixed_edits, fixed_strengths, refuse_gains
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
_ELSE = "Use `neva export merge` or `neva export stock`."


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
    """Writes what a model does at fixed strengths as a control vector for llama.cpp.

    llama.cpp adds it to any GGUF of the same base model, whatever its quantization, by
    `llama-cli -m base.gguf --control-vector output.gguf`.

    Args:
        model ([`NeVAModel`] or `nn.Module`): A model with NeVA layers; it is not changed. Do not train it meanwhile.
        output (`str` or `os.PathLike`): The file to make, which ends in `.gguf`.
        strengths (`dict[str, float]`, *optional*): Value -> strength. `None` takes those that are set on the model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Its tokenizer; `model.tokenizer` when `None`.
        source (`str`, *optional*): The neuron map's repository or folder, for the note of where the export came from.
        prompts (`Sequence[str]`, *optional*): Questions to compare on; `CHECK_PROMPTS` when `None`.
        tolerance (`float`, *optional*): The largest difference of a logit, see [`reference`].
        force (`bool`): Whether a file that is there is replaced.

    Returns:
        [`Export`]: Where it is, and the largest difference of a logit.

    Raises:
        `NeVAError`: For gains, gates, edits of the first block (llama.cpp has no direction for it), architectures whose
            blocks do more with the edit than add it, a file that is there, or an export that is off.

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
    refuse_gains(edits, "a control vector")
    twin = bare_twin(model)
    architecture = _architecture(twin)
    written = directions(twin, edits)
    expected = reference(model, tokenizer, kept, prompts, tolerance)
    origin = Origin(source, base_name(model), kept)
    with new_file(file) as unfinished:
        _write(unfinished, architecture, written, origin)
        check = _check(twin, read_directions(unfinished), expected)
    return Export("gguf", file, kept, check)


def directions(base: Any, edits: Mapping[str, FixedEdit]) -> dict[int, torch.Tensor]:
    """What each decoder block adds to the residual stream.

    Args:
        base ([`~transformers.PreTrainedModel`]): The base model, without NeVA layers.
        edits (`Mapping[str, FixedEdit]`): Down projection -> its edit, shifts alone.

    Returns:
        `dict[int, torch.Tensor]`: Number of the block, from 0 -> float32 `[hidden]`, in order.

    Raises:
        `NeVAError`: If an edited module is no FFN down projection of a block, or is in the first.
    """
    blocks, known = decoder_blocks(base)[0], find_down_projections(base)
    found = {}
    for name, edit in edits.items():
        if name not in known:
            raise NeVAError(
                f"This map edits {name!r}, which is no FFN down projection of a decoder block, so a control vector cannot "
                f"hold it. {_ELSE}"
            )
        found[int(name.removeprefix(f"{blocks}.").split(".")[0])] = edit.shift
    if 0 in found:
        raise NeVAError(
            "This map edits the first decoder block, and llama.cpp's control vectors begin with the second. Make a map "
            f"of later layers, or: {_ELSE[:1].lower()}{_ELSE[1:]}"
        )
    return dict(sorted(found.items()))


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
            f"the edit does not reach the residual stream as a constant, and a control vector would be wrong. {_ELSE}"
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


def _check(twin: Any, read: Mapping[int, torch.Tensor], expected: Any) -> Check:
    """Computes what llama.cpp computes: the base model with a direction added behind each block."""
    blocks = decoder_blocks(twin)[1]

    def add(direction: torch.Tensor) -> Any:
        def hook(block: nn.Module, inputs: Any, output: Any) -> Any:
            stream = output[0] if isinstance(output, tuple) else output
            moved = stream + direction.to(stream.device, stream.dtype)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        return hook

    with ExitStack() as hooks:
        for number, direction in read.items():
            hooks.enter_context(blocks[number].register_forward_hook(add(direction)))
        return expected.check(twin, "The control vector", _ELSE)
