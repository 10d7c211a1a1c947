"""Finished pieces of a long measurement, kept on disk: an interrupted run goes on where it was.

A run is a list of pieces, each with a name, and the pieces of one run lie in one folder under one key (what is measured
and how). Several processes may each do a part of a run: every part writes a file of its own and reads all of them.
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

from neva_hf import NeuronMap


class Kept:
    """The pieces of one run.

    Args:
        folder (`Path`): Where the files lie: `.NAME-KEY.PART.state.json`.
        name (`str`): The name of the run.
        key (`Mapping[str, Any]`): What the pieces depend on, as plain data; another key is another run.
        part (`str`): The name of this process's part.
    """

    def __init__(self, folder: Path, name: str, key: Mapping[str, Any], part: str = "all") -> None:
        stem = f".{name}-{fingerprint(key)}"
        self.path = folder / f"{stem}.{part}.state.json"
        self.own: dict[str, Any] = {}
        self.pieces: dict[str, Any] = {}
        for path in sorted(folder.glob(f"{stem}.*.state.json")):
            found = json.loads(path.read_text())
            self.pieces |= found
            if path == self.path:
                self.own = found

    def __contains__(self, name: str) -> bool:
        return name in self.pieces

    def __getitem__(self, name: str) -> Any:
        return self.pieces[name]

    def get(self, name: str) -> Any:
        return self.pieces.get(name)

    def put(self, name: str, found: Any) -> None:
        """Keeps a piece; a reader sees the old file or the new one, never half of one."""
        self.own[name] = self.pieces[name] = found
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(self.own))
        os.replace(unfinished, self.path)


@dataclass(frozen=True)
class Piece:
    """A piece of work.

    Args:
        name (`str`): Under which the result is kept.
        cost (`float`): How long it takes, in any unit that all pieces share (about the tokens that are run).
        compute (`Callable`): Gives the result, as plain data; pieces before it are there by then.
    """

    name: str
    cost: float
    compute: Callable[[], Any]


def work_off(kept: Kept, pieces: Sequence[Piece]) -> None:
    """Computes what is not kept yet, in order, and says after each piece how long the rest will take."""
    todo = [piece for piece in pieces if piece.name not in kept]
    print(f"{len(pieces)} pieces, {len(pieces) - len(todo)} of them kept in {kept.path.name}", flush=True)
    started, done, whole = time.time(), 0.0, sum(piece.cost for piece in todo)
    for number, piece in enumerate(todo, start=1):
        before = time.time()
        kept.put(piece.name, piece.compute())
        done += piece.cost
        left = (time.time() - started) * (whole - done) / done
        spent = f"{time.time() - before:.0f} s"
        print(f"[{number} of {len(todo)}] {piece.name}: {spent}, about {left / 60:.0f} min left", flush=True)


def fingerprint(key: Any) -> str:
    """Twelve hexadecimal digits that tell plain data apart."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]


def map_fingerprint(neuron_map: NeuronMap) -> str:
    """Twelve hexadecimal digits that tell maps apart: their edits and what scales them."""
    digest = hashlib.sha256(json.dumps([neuron_map.values, neuron_map.config.units], sort_keys=True).encode())
    for name, tensor in sorted(neuron_map.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
