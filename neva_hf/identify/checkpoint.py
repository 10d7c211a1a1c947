"""A pass on disk: its tensors and how far they go, so that a killed run goes on where it was.

Tensors are taken up bit for bit, so an interrupted pass ends with the very numbers of one that was not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from neva_hf.scenarios import Scenario, scenarios_hash

from .parallel import processes
from .statistics import Statistics


def checkpoint_key(model_name: str, scenarios: Sequence[Scenario], statistics: Statistics) -> str:
    """What a checkpoint must agree in to be taken up: model, scenarios, values, layers, share of work, and what is kept."""
    agreed = [model_name, scenarios_hash(scenarios), statistics.values, statistics.modules, list(processes())]
    if statistics.scatter is not None:
        agreed.append("probes")
    if statistics.gain_gradient is not None:
        agreed.append("gains")
    return json.dumps(agreed, ensure_ascii=False)


def write_checkpoint(path: Path, tensors: Mapping[str, torch.Tensor], done: int, key: str) -> None:
    """Writes what a pass has found in its first `done` steps; a reader sees the old file or the new one, never half of one.

    Args:
        path (`Path`): The file.
        tensors (`Mapping[str, torch.Tensor]`): What was found so far.
        done (`int`): After how many steps.
        key (`str`): What a run must agree in to take it up.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    save_file(dict(tensors), unfinished, metadata={"key": key, "done": str(done)})
    os.replace(unfinished, path)


def read_checkpoint(path: Path, tensors: Mapping[str, torch.Tensor], key: str) -> int:
    """Fills the tensors of a pass from a checkpoint, if there is one that agrees in the key.

    Args:
        path (`Path`): The file.
        tensors (`Mapping[str, torch.Tensor]`): Filled in place.
        key (`str`): The key of this run.

    Returns:
        `int`: How many steps it covers; 0 when there is none to take up.
    """
    if not path.is_file():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                return 0
            found = {name: file.get_tensor(name) for name in tensors}
    except SafetensorError:
        # Half a file, from a disk that was full: the pass begins anew.
        return 0
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(found[name])
    return int(metadata["done"])
