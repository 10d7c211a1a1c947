"""What the tests of exports share: models with maps, and processes that know nothing of neva_hf."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny import random_map, tiny_reader, tiny_tokenizer

from neva_hf import NeuronMap, NeVAModel
from neva_hf.architectures import find_down_projections

STRENGTHS = {"benevolence": 1.0, "power": -0.5}
PROMPT = [[5, 17, 80, 33, 9, 41, 60]]

_ALONE = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "neva_hf":
            raise ImportError("neva_hf is blocked in this process")

sys.meta_path.insert(0, Blocked())
import torch
from safetensors.torch import save_file

with torch.inference_mode():
    logits = load()(torch.tensor(json.loads(sys.argv[1]))).logits
assert "neva_hf" not in sys.modules
save_file({"logits": logits.contiguous()}, sys.argv[2])
"""
LOAD_MERGED = """
def load():
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(sys.argv[3]).eval()
"""
LOAD_STOCK = """
def load():
    from peft import AutoPeftModelForCausalLM
    return AutoPeftModelForCausalLM.from_pretrained(sys.argv[3]).eval()
"""


def logits_alone(load: str, folder: Path, scratch: Path) -> torch.Tensor:
    """The logits on `PROMPT` of what a fresh process loads, in which importing neva_hf is an error."""
    from safetensors.torch import load_file

    # What loads it has to be defined behind the blocker.
    program = _ALONE.replace("import torch\n", f"{load}\nimport torch\n", 1)
    file = scratch / "logits.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(PROMPT), str(file), str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(file)["logits"]


def logits(model: Any, **call: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor(PROMPT), **call).logits


def live_model(
    architecture: str = "llama", *, folder: Path | None = None, later: bool = False, **map_options: Any
) -> NeVAModel:
    """A tiny model with a random map on it and a tokenizer; with a folder, its base is saved there first.

    `later` leaves the first block alone, as control vectors have to.
    """
    base = tiny_reader(architecture)
    if folder is not None:
        base.save_pretrained(folder)
        base.config._name_or_path = base.name_or_path = str(folder)
        map_options["base_model_name_or_path"] = str(folder)
    neuron_map = random_map(base, **map_options)
    if later:
        first = next(iter(find_down_projections(base)))
        kept = {name: edits for name, edits in neuron_map.modules.items() if name != first}
        neuron_map = NeuronMap(replace(neuron_map.config, target_modules=None, neurons=8), kept)
    model = neuron_map.apply_to(base)
    model.tokenizer = tiny_tokenizer()
    return model


def left_in(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())
