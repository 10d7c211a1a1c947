"""Finished pieces of a long measurement, kept on disk: an interrupted run goes on where it was.

A run is a list of pieces, each with a name; the pieces of one run lie in one folder under one key (what is measured, and
on what). Several processes may each do a part of a run: every part writes a file of its own and reads all of them.
Results are plain data, and JSON gives every float back bit for bit: a resumed run ends with the very numbers of one that
was not interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neva_hf.dial import neva_layers
from neva_hf.neuron_map import NeuronMap

# Of each weight, so many numbers tell one model from another.
_SAMPLED = 256


class Kept:
    """The pieces of one run.

    Args:
        folder (`Path`, *optional*): Where the files lie: `NAME-KEY.PART.state.json`. In memory alone when `None`.
        name (`str`): The name of the run.
        key (`Any`): What the pieces depend on, as plain data; another key is another run.
        part (`str`): The name of this process's part.
    """

    def __init__(self, folder: Path | None, name: str, key: Any, part: str = "0") -> None:
        self.folder, self.stem = folder, f"{name}-{fingerprint(key)}"
        self.path = None if folder is None else folder / f"{self.stem}.{part}.state.json"
        self.own: dict[str, Any] = {}
        self.pieces: dict[str, Any] = {}
        self.refresh()

    def refresh(self) -> None:
        """Reads what all parts have finished by now."""
        for path in [] if self.folder is None else sorted(self.folder.glob(f"{self.stem}.*.state.json")):
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                # From a disk that was full, or from an editor: these pieces are computed again.
                continue
            if not isinstance(found, dict):
                continue
            self.pieces |= found
            if path == self.path:
                self.own = found

    def __contains__(self, name: str) -> bool:
        return name in self.pieces

    def __getitem__(self, name: str) -> Any:
        return self.pieces[name]

    def put(self, name: str, found: Any) -> None:
        """Keeps a piece; a reader sees the old file or the new one, never half of one."""
        # (as it is read again: lists for tuples, names for other keys)
        self.own[name] = self.pieces[name] = json.loads(json.dumps(found, default=str))
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(self.own), encoding="utf-8")
        os.replace(unfinished, self.path)


@dataclass(frozen=True)
class Piece:
    """A piece of work.

    Args:
        name (`str`): Under which the result is kept.
        cost (`float`): About how long it takes, in a unit that all pieces share: tokens that the model runs.
        compute (`Callable`): Gives the result, as plain data.
        needs (`str`): The method that must be ready for it; empty for none.
        label (`str`): What people read while it runs; the name unless given.
    """

    name: str
    cost: float
    compute: Callable[[], Any]
    needs: str = ""
    label: str = ""


def work_off(kept: Kept, pieces: Sequence[Piece], tell: Callable[[str], None] = lambda line: None) -> None:
    """Computes what is not kept yet, in order, and says before each piece how long the rest will take.

    Args:
        kept ([`Kept`]): Where results go.
        pieces (`Sequence[Piece]`): The work.
        tell (`Callable[[str], None]`): Gets one line per piece.
    """
    todo = [piece for piece in pieces if piece.name not in kept]
    started, done, whole = time.monotonic(), 0.0, sum(piece.cost for piece in todo)
    for number, piece in enumerate(todo, start=1):
        left = ""
        if done:
            seconds = (time.monotonic() - started) * (whole - done) / done
            left = f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"
        tell(f"[{number} of {len(todo)}] {piece.label or piece.name}{left}")
        # (a piece that needed it may have made it meanwhile)
        if piece.name not in kept:
            kept.put(piece.name, piece.compute())
        done += piece.cost


def share_out(pieces: Sequence[Piece], count: int, fits: Mapping[str, float] | None = None) -> list[list[Piece]]:
    """Divides work among processes so that all end at about the same time.

    The pieces of a method that must be fitted first stay together, or several processes would fit it; the others fill up.

    Args:
        pieces (`Sequence[Piece]`): The work.
        count (`int`): How many processes.
        fits (`Mapping[str, float]`, *optional*): What fitting each method costs, in the unit of the pieces' costs.

    Returns:
        `list[list[Piece]]`: The pieces of each process, each in the order given.

    Example:

    ```py
    >>> from neva_hf.evaluation.kept import Piece, share_out
    >>> work = [Piece(name, cost, dict) for name, cost in (("a", 3), ("b", 2), ("c", 2), ("d", 1))]
    >>> [[piece.name for piece in part] for part in share_out(work, 2)]
    [['a', 'd'], ['b', 'c']]
    ```
    """
    bundles: dict[str, list[int]] = {}
    for number, piece in enumerate(pieces):
        stays = bool((fits or {}).get(piece.needs))
        bundles.setdefault(piece.needs if stays else f"#{number}", []).append(number)
    costs = {
        name: sum(pieces[number].cost for number in numbers) + (fits or {}).get(name, 0.0)
        for name, numbers in bundles.items()
    }
    loads, parts = [0.0] * count, [list[int]() for _ in range(count)]
    for name in sorted(bundles, key=lambda name: -costs[name]):
        lightest = loads.index(min(loads))
        loads[lightest] += costs[name]
        parts[lightest] += bundles[name]
    return [[pieces[number] for number in sorted(part)] for part in parts]


def fingerprint(key: Any) -> str:
    """Twelve hexadecimal digits that tell plain data apart."""
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:12]


def map_fingerprint(neuron_map: NeuronMap) -> str:
    """Twelve hexadecimal digits that tell maps apart: their edits, and what scales and gates them."""
    config = neuron_map.config
    scales = [neuron_map.values, config.units, config.gate_probability]
    digest = hashlib.sha256(json.dumps(scales, sort_keys=True).encode())
    for name, tensor in sorted(neuron_map.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def model_fingerprint(model: nn.Module) -> str:
    """Twelve hexadecimal digits that tell base models apart: a sample of each weight; a map on the model does not count."""
    digest = hashlib.sha256()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "neva_" in name:
                continue
            flat = parameter.detach().reshape(-1)
            sample = flat[:: max(flat.numel() // _SAMPLED, 1)][:_SAMPLED]
            digest.update(f"{tuple(parameter.shape)}{parameter.dtype}".encode())
            if sample.device.type != "meta":
                digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def adapters_fingerprint(model: nn.Module) -> str:
    """Twelve hexadecimal digits that tell apart what neuron maps are on a model; empty without any."""
    digest, found = hashlib.sha256(), False
    for layer in neva_layers(model):
        for name, config in sorted(layer.neva_configs.items()):
            digest.update(json.dumps([layer.module_name, name, config.values, config.units]).encode())
        for name, tensor in sorted(layer.state_dict().items()):
            if name.startswith("neva_"):
                found = True
                digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12] if found else ""
