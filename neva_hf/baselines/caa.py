"""CAA: one vector per value, added to the residual stream behind one layer."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from neva_hf.errors import NeVAError
from neva_hf.measure import margins, scenario_log_probs
from neva_hf.scenarios import scenarios_hash

from .calibrate import ROUGH, calibrated
from .hooks import adding, neutral
from .method import Evidence, Method

Reading = Literal["mean", "last"]

# What a layer is chosen by: so many dev scenarios, and at most so many layers, evenly from this part of the depth. (CAA is
# best in the middle, Panickssery et al. 2023, section 4; of SmolLM2-135M-Instruct's 30 layers 18 is.)
DEV_SCENARIOS, LAYERS, PART = 8, 6, (0.3, 0.8)


def candidate_layers(depth: int, count: int = LAYERS) -> list[int]:
    """The layers that are tried, evenly from 30% to 80% of the depth.

    Example:

    ```py
    >>> from neva_hf.baselines.caa import candidate_layers
    >>> candidate_layers(30)
    [9, 12, 15, 18, 21, 24]
    ```
    """
    low, high = (round(part * depth) for part in PART)
    high = min(high, depth - 1)
    steps = max(min(count, high - low + 1) - 1, 1)
    return sorted({round(low + (high - low) * step / steps) for step in range(steps + 1)})


def caa(
    evidence: Evidence,
    *,
    reading: Reading = "mean",
    layers: Sequence[int] | None = None,
    dev_scenarios: int = DEV_SCENARIOS,
) -> Method:
    """Contrastive Activation Addition (Panickssery et al. 2023, arXiv 2312.06681, section 3).

    The vector of a value is the mean over training scenarios of h(own reply) - mean over competing replies of h(reply), h
    being the residual stream behind a layer; strength times the vector is added there, at all positions. There h is read
    at the last token, which is the answer's letter; replies here are sentences that end in a full stop, so h is their
    mean over the reply's tokens unless `reading="last"`.

    The layer, one for all values, is the one with the largest mean shift of the target's margin on the first scenarios of
    the dev split, at strength +1 after a rough calibration to equal KL. Without dev scenarios or neutral texts it is the
    candidate in the middle.

    Args:
        evidence ([`Evidence`]): What to learn from.
        reading (`str`): `"mean"` or `"last"`.
        layers (`Sequence[int]`, *optional*): The layers to choose from, in place of [`candidate_layers`].
        dev_scenarios (`int`): On how many dev scenarios.

    Returns:
        [`Method`]: Strength 1 adds the mean difference as it is.

    Raises:
        `NeVAError`: If a layer does not exist, or no training scenario contrasts one of the values.
    """
    readings = evidence.readings
    depth = len(readings.blocks)
    tried = list(layers) if layers is not None else candidate_layers(depth)
    if not tried or not all(0 <= layer < depth for layer in tried):
        raise NeVAError(f"`layers` must be numbers from 0 to {depth - 1}, got {tried}.")
    if reading not in ("mean", "last"):
        raise NeVAError(f"`reading` must be 'mean' or 'last', got {reading!r}.")
    vectors = readings.mean_stream() if reading == "mean" else readings.last_stream()

    def at_layer(layer: int) -> Method:
        at = adding(evidence.model, readings.values, {readings.blocks[layer]: vectors[:, layer]})
        return Method("CAA", readings.values, at, notes={"layer": layer, "layers": depth, "reading": reading})

    dev = list(evidence.dev)[:dev_scenarios]
    if len(tried) == 1 or not dev or not evidence.texts:
        return at_layer(tried[len(tried) // 2])
    path = evidence.checkpoint and evidence.checkpoint.with_name(f"{evidence.checkpoint.name}.caa.json")
    key = [scenarios_hash(evidence.train), scenarios_hash(dev), list(evidence.texts), readings.values, reading]
    kept = _kept(path, str(getattr(evidence.model, "name_or_path", "")), key)
    for layer in evidence.progress(tried, "layers"):
        # (by names, as JSON has them)
        if str(layer) not in kept["shifts"]:
            kept["shifts"][str(layer)] = dev_shift(at_layer(layer), evidence, dev_scenarios)
            if path is not None:
                unfinished = path.with_name(f"{path.name}.{os.getpid()}")
                unfinished.write_text(json.dumps(kept))
                os.replace(unfinished, path)
    shifts = {str(layer): kept["shifts"][str(layer)] for layer in tried}
    best = at_layer(int(max(shifts, key=lambda layer: shifts[layer])))
    return replace(best, notes={**best.notes, "dev_shift": shifts})


def _kept(path: Path | None, model: str, key: Sequence[object]) -> dict[str, Any]:
    """What an interrupted choice of a layer found, if it agrees in what it depends on."""
    agreed = hashlib.sha256(json.dumps([model, key]).encode()).hexdigest()
    if path is not None and path.is_file():
        found = json.loads(path.read_text())
        if found["key"] == agreed:
            return dict(found)
    return {"key": agreed, "shifts": {}}


def dev_shift(method: Method, evidence: Evidence, dev_scenarios: int = DEV_SCENARIOS) -> float:
    """How far a method at roughly calibrated strength +1 moves the targets' margins on dev scenarios.

    Args:
        method ([`Method`]): Not calibrated yet.
        evidence ([`Evidence`]): With dev scenarios and neutral texts.
        dev_scenarios (`int`): On how many.

    Returns:
        `float`: Nats per token, the mean over values and over the scenarios that contrast them.
    """
    model, tokenizer = evidence.model, evidence.tokenizer
    found = calibrated(method, model, tokenizer, evidence.texts, signs=(1,), phases=(ROUGH,))
    dev = list(evidence.dev)[:dev_scenarios]
    shifts = []
    with neutral(model):
        base = scenario_log_probs(model, tokenizer, dev)
        for value in method.values:
            with found.at([{value: 1.0}]):
                moved = scenario_log_probs(model, tokenizer, dev, system=found.system({value: 1.0}))
            pairs = zip(margins(moved, value), margins(base, value), strict=True)
            own = [after - before for after, before in pairs]
            shifts += [sum(own) / len(own)] if own else []
    return float(torch.tensor(shifts).mean()) if shifts else 0.0
