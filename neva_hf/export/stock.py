"""A stock PEFT adapter for fixed strengths: it loads with PEFT alone.

PEFT's method BEFT trains a vector that is added to the output of linear layers. A shift of the inputs of a down
projection is such a vector, so an adapter of that type on the down projections holds an edit exactly.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import BeftConfig, PeftModel, TaskType
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from neva_hf.dial import active_configs
from neva_hf.errors import NeVAError
from neva_hf.map_files import PREFIX
from neva_hf.projection import innermost
from neva_hf.strengths import Strengths

from .check import reference
from .fixed import FixedEdit, bare_twin, base_model, fixed_edits, fixed_strengths, refuse_gains
from .output import check_output_folder, new_folder
from .result import Export, Origin, write_card, write_note


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

    What was written is loaded with PEFT on the same base model and compared with the live model before it is put in
    place.

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
        `NeVAError`: For gains, gates, down projections that BEFT does not take (Conv1D), a folder that holds something,
            or an export that is off.

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
    refuse_gains(edits, "a stock PEFT adapter")
    twin = bare_twin(model)
    for name in edits:
        kind = innermost(twin.get_submodule(name))
        if not isinstance(kind, nn.Linear):
            raise NeVAError(
                f"{name!r} is a {type(kind).__name__}, and the stock method BEFT takes linear layers alone. Use "
                "`neva export merge`, which writes the edit into the bias."
            )
    expected = reference(model, tokenizer, kept, prompts, tolerance)
    origin = Origin(source, base_name(model), kept)
    with new_folder(folder, force) as unfinished:
        _write(unfinished, edits, _config(model, edits, origin.base_model))
        check = expected.check(
            _load(twin, unfinished), "The stock adapter", "Keep the neuron map, or use `neva export merge`."
        )
        write_note(unfinished, "stock", origin, check)
        write_card(unfinished, "A value edit as a stock PEFT adapter", _USE, {"library_name": "peft"}, origin, check)
    return Export("stock", folder, kept, check)


def base_name(model: nn.Module) -> str | None:
    """The name of the base model under the NeVA layers: the one that was loaded, or else the one that the map names."""
    loaded = getattr(base_model(model), "name_or_path", None)
    named = (config.base_model_name_or_path for config in active_configs(model).values())
    return loaded or next((name for name in named if name), None)


def _config(model: nn.Module, edits: Mapping[str, FixedEdit], base: str | None) -> BeftConfig:
    revisions = [c.revision for c in active_configs(model).values() if c.base_model_name_or_path == base]
    return BeftConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base,
        revision=revisions[0] if revisions else None,
        target_modules=sorted(edits),
        inference_mode=True,
    )


def _write(folder: Path, edits: Mapping[str, FixedEdit], config: BeftConfig) -> None:
    tensors = {f"{PREFIX}{name}.beft_bias": edit.shift[None].contiguous() for name, edit in edits.items()}
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    # A set would be written in another order every time.
    replace(config, target_modules=sorted(edits)).save_pretrained(str(folder))


def _load(base: Any, folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        # That the adapter cannot be merged where the base has no bias; the card says so.
        warnings.filterwarnings("ignore", message="Detected that the base layer has no bias")
        try:
            return PeftModel.from_pretrained(base, str(folder)).eval()
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            raise NeVAError(
                f"PEFT does not load the adapter on this base model: {error}. Nothing was written. Keep the neuron map, "
                "or use `neva export merge`."
            ) from error


_USE = """An edit of feed-forward neurons at fixed strengths, as a stock PEFT adapter (BEFT: a vector that is added to the
output of the down projections). It needs PEFT 0.20 or newer, and nothing else:

```py
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("THIS FOLDER OR REPOSITORY")
```

PEFT can switch it off (`with model.disable_adapter():`). It cannot merge it where the base model's down projections have
no bias."""
