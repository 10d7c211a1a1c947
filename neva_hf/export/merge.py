"""The edit written into the weights of a base model, for programs that know neither neva-hf nor PEFT.

Invariant: nothing is merged that would get lost on the way to disk and back. Shifts need a bias of the down projection.
Where an architecture has one, it is used; where its config can ask for one (`mlp_bias`: Llama and others), it is asked
for, and all biases that come along with it are 0; elsewhere transformers would drop the bias silently, so the export
is refused.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from neva_hf.errors import NeVAError
from neva_hf.projection import is_plain
from neva_hf.strengths import Strengths

from .check import find_tokenizer, reference
from .fixed import FixedEdit, bare_twin, fixed_edits, fixed_strengths
from .output import check_output_folder, new_folder
from .result import Export, Origin, write_card, write_note
from .stock import base_name

_ELSE = "Use `neva export stock`, which keeps the edit as an adapter."


def export_merged(
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
    """Writes a whole model that behaves at all times as this one does at fixed strengths.

    Gains are folded into the columns of the down projections, shifts into their bias. The folder holds the model in the
    dtype that it is loaded in, and its tokenizer. What was written is loaded again by transformers (a second model in
    memory) and compared with the live model before it is put in place.

    Args:
        model ([`NeVAModel`] or `nn.Module`): A model with NeVA layers; it is not changed. Do not train it meanwhile.
        output (`str` or `os.PathLike`): The folder to make.
        strengths (`dict[str, float]`, *optional*): Value -> strength. `None` takes those that are set on the model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Its tokenizer; `model.tokenizer` when `None`.
        source (`str`, *optional*): The neuron map's repository or folder, for the note of where the export came from.
        prompts (`Sequence[str]`, *optional*): Questions to compare on; `CHECK_PROMPTS` when `None`.
        tolerance (`float`, *optional*): The largest difference of a logit, see [`reference`].
        force (`bool`): Whether an earlier export in the folder is replaced.

    Returns:
        [`Export`]: Where it is, and the largest difference of a logit.

    Raises:
        `NeVAError`: For gates, quantized weights, architectures that cannot hold the bias, a folder that holds something,
            or an export that is off.

    Example:

    ```py
    >>> from neva_hf.export import export_merged
    >>> export_merged(model, "kind-model", {"benevolence": 1.0}).check.difference < 1e-3  # doctest: +SKIP
    True
    >>> # and, without neva_hf: transformers.AutoModelForCausalLM.from_pretrained("kind-model")
    ```
    """
    folder = check_output_folder(output, force)
    kept = fixed_strengths(model, strengths)
    edits = fixed_edits(model, kept)
    twin = bare_twin(model)
    _merge(twin, edits)
    tokenizer = find_tokenizer(model, tokenizer)
    expected = reference(model, tokenizer, kept, prompts, tolerance)
    origin = Origin(source, base_name(model), kept)
    with new_folder(folder, force) as unfinished:
        _save(twin, tokenizer, unfinished)
        check = expected.check(_load(twin, unfinished), "The merged model", _ELSE)
        write_note(unfinished, "merge", origin, check)
        data = {"library_name": "transformers", "base_model_relation": "finetune"}
        write_card(unfinished, "A model with a value edit in its weights", _USE, data, origin, check)
    return Export("merge", folder, kept, check)


def _merge(twin: Any, edits: Mapping[str, FixedEdit]) -> None:
    """Writes the edits into a twin of the base model: new tensors, never into the shared ones."""
    for name in edits:
        layer = twin.get_submodule(name)
        if not is_plain(layer):
            raise NeVAError(
                f"{name!r} is a {type(layer).__name__} without a plain floating-point weight, so an edit cannot be merged "
                f"into it. Load the base model without quantization, or use `neva export stock`."
            )
    needed = [name for name, edit in edits.items() if edit.shifts and twin.get_submodule(name).bias is None]
    if needed:
        _give_biases(twin, needed)
    for name, edit in edits.items():
        layer = twin.get_submodule(name)
        weight = layer.weight
        with torch.no_grad():
            if edit.scale is not None:
                scale = edit.scale.to(weight.device)
                scaled = weight.float() * (scale[:, None] if isinstance(layer, Conv1D) else scale)
                layer.weight = nn.Parameter(scaled.to(weight.dtype), requires_grad=False)
            if edit.shifts:
                # Summed in float32 and rounded once, as the live model does.
                bias = layer.bias.float() + edit.shift.to(weight.device)
                layer.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)


def _give_biases(twin: Any, needed: Sequence[str]) -> None:
    """Asks the config for biases in the feed-forward networks, and gives the twin all that come along, as zeros.

    Raises:
        `NeVAError`: If the config cannot ask for them, or they would not be where they are needed.
    """
    config = copy.deepcopy(twin.config)
    refusal = (
        f"The FFN down projections of {type(twin).__name__} have no bias (such as {needed[0]!r}), and its config cannot "
        "ask for one: transformers would save the edit, and silently drop it when the model is loaded again. "
        f"{_ELSE}"
    )
    decoder = config.get_text_config(decoder=True)
    if getattr(decoder, "mlp_bias", None) is not False:
        raise NeVAError(refusal)
    decoder.mlp_bias = True
    with torch.device("meta"):
        asked = type(twin)(config)
    here = dict(twin.named_parameters(remove_duplicate=False))
    new = {
        name: parameter
        for name, parameter in asked.named_parameters(remove_duplicate=False)
        if name not in here and name.endswith(".bias")
    }
    if any(f"{name}.bias" not in new for name in needed):
        raise NeVAError(refusal)
    for name, parameter in new.items():
        module = twin.get_submodule(name.rpartition(".")[0])
        zeros = torch.zeros(parameter.shape, dtype=module.weight.dtype, device=module.weight.device)
        module.bias = nn.Parameter(zeros, requires_grad=False)
    twin.config = config


def _save(twin: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    try:
        twin.save_pretrained(folder)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise NeVAError(
            f"transformers does not save the merged model: {error}. Nothing was written. {_ELSE}"
        ) from error
    tokenizer.save_pretrained(folder)


def _load(twin: Any, folder: Path) -> nn.Module:
    """What a stranger's transformers makes of the folder.

    Raises:
        `NeVAError`: If it does not load, or not all of it does.
    """
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(
            folder,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            device_map=getattr(twin, "hf_device_map", None) or {"": twin.device},
            dtype=twin.dtype,
            attn_implementation=twin.config._attn_implementation,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise NeVAError(
            f"transformers does not load the merged model again: {error}. Nothing was written. {_ELSE}"
        ) from error
    lost = sorted(report["unexpected_keys"]) + sorted(report["missing_keys"])
    if lost:
        raise NeVAError(
            f"transformers does not load all of the merged model again ({len(lost)} tensors, such as {lost[0]!r}). "
            f"Nothing was written. {_ELSE}"
        )
    return loaded.eval()


_USE = """A whole model, with an edit of feed-forward neurons at fixed strengths merged into its weights. It needs
transformers (or vLLM, where that knows the biases of this architecture), and nothing else:

```py
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS FOLDER OR REPOSITORY")
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER OR REPOSITORY")
```"""
