"""A stock PEFT adapter for fixed strengths: it loads with PEFT alone.

PEFT's method BEFT trains a vector that is added to the output of linear layers. A shift of the inputs of a down
projection is such a vector, so an adapter of that type on the down projections holds an edit without gains exactly. One
with gains is a LoRA adapter, see [`stock_lora`].
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import BeftConfig, PeftConfig, PeftModel, TaskType
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from neva_hf.dial import active_configs
from neva_hf.errors import NeVAError
from neva_hf.map_files import PREFIX
from neva_hf.projection import innermost
from neva_hf.strengths import Strengths

from .check import reference
from .fixed import FixedEdit, bare_twin, base_model, fixed_edits, fixed_strengths
from .output import check_output_folder, new_folder
from .result import Export, Origin, write_card, write_note
from .stock_lora import lora_config, lora_tensors


def export_stock(
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
    """Writes what a model does at fixed strengths as an adapter that PEFT loads by itself.

    It is a BEFT adapter where edits are shifts of linear layers, and a LoRA adapter where neurons have gains, or the down
    projections are of GPT-2's kind (Conv1D), which BEFT does not take. What was written is loaded with PEFT on the same
    base model and compared with the live model before it is put in place.

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
        `NeVAError`: For gates, down projections that PEFT's adapters do not take, a folder that holds something, or an
            export that is off.

    Example:

    ```py
    >>> from neva_hf.export import export_stock
    >>> export_stock(model, "kind-adapter", {"benevolence": 1.0}).check.difference < 1e-3  # doctest: +SKIP
    True
    >>> # and, without neva_hf: peft.AutoPeftModelForCausalLM.from_pretrained("kind-adapter")
    ```
    """
    folder = check_output_folder(output, force)
    kept = fixed_strengths(model, strengths)
    edits = fixed_edits(model, kept)
    twin = bare_twin(model)
    layers = {name: innermost(twin.get_submodule(name)) for name in edits}
    for name, layer in layers.items():
        if not isinstance(layer, (nn.Linear, Conv1D)):
            raise NeVAError(
                f"{name!r} is a {type(layer).__name__}, and PEFT's stock adapters are put on linear layers alone. Use "
                "`neva export merge`, or keep the neuron map."
            )
    transposed = [isinstance(layer, Conv1D) for layer in layers.values()]
    lora = any(transposed) or any(edit.scale is not None for edit in edits.values())
    expected = reference(model, tokenizer, kept, prompts, tolerance)
    origin = Origin(source, base_name(model), kept)
    with new_folder(folder, force) as unfinished:
        about = _about(model, origin.base_model)
        if lora:
            tensors = lora_tensors(twin, edits)
            config: PeftConfig = lora_config(tensors, transposed=all(transposed), **about)
        else:
            tensors = _tensors(edits)
            config = BeftConfig(target_modules=sorted(edits), **about)
        _write(unfinished, tensors, config)
        check = expected.check(
            _load(twin, unfinished), "The stock adapter", "Keep the neuron map, or use `neva export merge`."
        )
        write_note(unfinished, "stock", origin, check)
        use = _USE.format(_LORA if lora else _BEFT)
        write_card(unfinished, "A value edit as a stock PEFT adapter", use, {"library_name": "peft"}, origin, check)
    return Export("stock", folder, kept, check)


def base_name(model: nn.Module) -> str | None:
    """The name of the base model under the NeVA layers: the one that was loaded, or else the one that the map names."""
    loaded = getattr(base_model(model), "name_or_path", None)
    named = (config.base_model_name_or_path for config in active_configs(model).values())
    return loaded or next((name for name in named if name), None)


def _about(model: nn.Module, base: str | None) -> dict[str, Any]:
    """What an adapter's config says, of whichever method it is."""
    revisions = [c.revision for c in active_configs(model).values() if c.base_model_name_or_path == base]
    return {
        "task_type": TaskType.CAUSAL_LM,
        "base_model_name_or_path": base,
        "revision": revisions[0] if revisions else None,
        "inference_mode": True,
    }


def _tensors(edits: Mapping[str, FixedEdit]) -> dict[str, torch.Tensor]:
    return {f"{PREFIX}{name}.beft_bias": edit.shift[None].contiguous() for name, edit in edits.items()}


def _write(folder: Path, tensors: Mapping[str, torch.Tensor], config: PeftConfig) -> None:
    save_file(dict(tensors), folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    # PEFT made a set of them, which would be written in another order every time.
    replace(config, target_modules=sorted(config.target_modules)).save_pretrained(str(folder))


def _load(base: Any, folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        # That the adapter cannot be merged where the base has no bias; the card says so.
        warnings.filterwarnings("ignore", message="Detected that the base layer has no bias")
        warnings.filterwarnings("ignore", message="`lora_bias=True` was passed but the targeted layer")
        try:
            return PeftModel.from_pretrained(base, str(folder)).eval()
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            raise NeVAError(
                f"PEFT does not load the adapter on this base model: {error}. Nothing was written. Keep the neuron map, "
                "or use `neva export merge`."
            ) from error


_BEFT = """Its method is BEFT, a
vector that is added to the output of the down projections. It needs PEFT 0.20 or newer, and nothing else:"""
_LORA = """Its method is LoRA with a
bias, on the down projections. It needs PEFT 0.14 or newer, and nothing else:"""
_USE = """An edit of feed-forward neurons at fixed strengths, as a stock PEFT adapter. {}

```py
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("THIS FOLDER OR REPOSITORY")
```

PEFT can switch it off (`with model.disable_adapter():`). It cannot merge it where the base model's down projections have
no bias."""
