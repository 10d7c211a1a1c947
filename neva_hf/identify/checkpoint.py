"""A pass on disk: statistics and how far they go, so that a killed run goes on where it was.

Sums are float64 and are taken up bit for bit, so an interrupted pass ends with the very statistics of one that was not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from neva_hf.scenarios import Scenario, scenarios_hash

from .parallel import processes
from .statistics import Statistics


def checkpoint_key(model_name: str, scenarios: Sequence[Scenario], statistics: Statistics) -> str:
    """What a checkpoint must agree in to be taken up: model, scenarios, values, layers, share of the work, and probes."""
    agreed = [model_name, scenarios_hash(scenarios), statistics.values, statistics.modules, list(processes())]
    if statistics.scatter is not None:
        agreed.append("probes")
    return json.dumps(agreed, ensure_ascii=False)


def write_checkpoint(path: Path, statistics: Statistics, done: int, key: str) -> None:
    """Writes statistics of the first `done` scenarios; a reader sees the old file or the new one, never half of one.

    Args:
        path (`Path`): The file.
        statistics ([`Statistics`]): The sums so far.
        done (`int`): After how many scenarios.
        key (`str`): From [`checkpoint_key`].
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    save_file(statistics.tensors(), unfinished, metadata={"key": key, "done": str(done)})
    os.replace(unfinished, path)


def read_checkpoint(path: Path, statistics: Statistics, key: str) -> int:
    """Fills statistics from a checkpoint, if there is one that agrees in the key.

    Args:
        path (`Path`): The file.
        statistics ([`Statistics`]): Filled in place.
        key (`str`): From [`checkpoint_key`].

    Returns:
        `int`: How many scenarios it covers; 0 when there is none to take up.
    """
    if not path.is_file():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                return 0
            found = {name: file.get_tensor(name) for name in statistics.tensors()}
    except SafetensorError:
        # Half a file, from a disk that was full: the pass begins anew.
        return 0
    with torch.no_grad():
        for name, tensor in statistics.tensors().items():
            tensor.copy_(found[name])
    return int(metadata["done"])
