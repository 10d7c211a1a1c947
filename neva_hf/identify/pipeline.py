"""The whole identification in one call."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedTokenizerBase

from neva_hf._version import __version__
from neva_hf.architectures import describe_base, find_down_projections
from neva_hf.config import NeVAConfig, check_value_names
from neva_hf.dial import neva_layers
from neva_hf.errors import NeVAError
from neva_hf.layer import layer_sizes
from neva_hf.measure import Progress, no_progress
from neva_hf.model import NeVAModel
from neva_hf.neuron_map import NeuronMap
from neva_hf.scenarios import Scenario, load_neutral_texts, load_scenarios, scenario_values, scenarios_hash
from neva_hf.values import ValueSystem

from .balance import balanced_neurons, candidates
from .calibrate import TARGET_KL, calibrate, spread
from .collect import collect, left_as_it_was
from .dose import dose_curves
from .gate import train_gates
from .probe import with_logits_per_unit
from .replies import reply_samples
from .score import SCORES, Scored, probe
from .select import build_map, check_request, middle_layers, top_neurons
from .sensitivity import fisher_samples
from .statistics import Statistics

# Texts that the divergence in dose curves is measured on.
_DOSE_TEXTS = 6
# How many scenarios gains are found in unless asked for: from few ones they are learned by heart.
_ENOUGH_FOR_GAINS = 100


def identify_neurons(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    scenarios: Sequence[Scenario] | None = None,
    *,
    values: Sequence[str] | None = None,
    neurons: int = 500,
    score: str | Callable[[Statistics], Scored] = "attribution",
    leakage_penalty: float = 1.0,
    gains: bool | None = None,
    layers: Sequence[int] | None = None,
    neutral_texts: Sequence[str] | None = None,
    target_kl: float = TARGET_KL,
    value_system: ValueSystem | None = None,
    dose_scenarios: Sequence[Scenario] = (),
    gates: bool = False,
    samples: int = 2048,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress[Any] = no_progress,
) -> NeuronMap:
    """Finds the neurons that carry values in a model, and calibrates their edits.

    One pass over the scenarios serves all values. The model is not changed. Under `accelerate launch` the processes share
    the scenarios, and all end with the same map.

    Args:
        model (`nn.Module`): A causal language model of transformers, without adapters.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        scenarios (`Sequence[Scenario]`, *optional*): What to find values in; the shipped ones when `None`.
        values (`Sequence[str]`, *optional*): Which values; all that the scenarios contrast when `None`.
        neurons (`int`): How many neurons per value.
        score (`str` or callable):
            For a `leakage_penalty` of 0: the name of a score (`"attribution"`), or a function from statistics to scores.
        leakage_penalty (`float`):
            What a shift of the other values' margins costs: neurons and shifts are chosen together so that the margin
            rises, the others stay where they are, and the KL divergence is small (see [`balanced_neurons`]). It takes
            another pass over the neutral texts. 0 takes the neurons with the highest scores, shifted as they are scored.
        gains (`bool`, *optional*):
            With a `leakage_penalty` above 0: whether neurons are edited in proportion to their activation as well
            (`x + s * (shift + gain * x)`). With many scenarios that moves the target further at the same cost, with few
            ones less far (SmolLM2-135M-Instruct: 198 against 24), so `None` decides by their number. It takes another pass
            over the scenarios. Without gains, an edit is one constant per layer, which takes no time in decoding.
        layers (`Sequence[int]`, *optional*): The layers that take part; from 20% to 95% of the depth when `None`.
        neutral_texts (`Sequence[str]`, *optional*): What to calibrate on; the shipped texts when `None`.
        target_kl (`float`): Mean KL divergence from the base model at strength 1, nats per token.
        value_system ([`ValueSystem`], *optional*): The definitions of the values, to go with the map.
        dose_scenarios (`Sequence[Scenario]`): Scenarios to measure dose curves on (see [`dose_curves`]), other ones than
            those that the neurons are found in; they are saved as `measurements["dose"]`. None are measured without them.
        gates (`bool`): Whether to train gates too (see [`train_gates`]): edits then act only as far as each token needs.
            Strengths are those of the whole edit. It takes another pass over the scenarios.
        samples (`int`): How many samples tell what shifts cost on neutral texts (see [`fisher_samples`]). Twice as many
            take twice as long, and move the target 2% further at the same cost (SmolLM2-135M-Instruct).
        seed (`int`): For the samples that measure the KL divergence of shifts.
        checkpoint (`str` or `os.PathLike`, *optional*): Where the passes are kept as they go (several files of that name
            and some ending): a run that was killed goes on from there and ends with the same map.
        progress ([`Progress`]): Shows how far it is.

    Returns:
        [`NeuronMap`]: Calibrated: strengths +1 and -1 cost `target_kl`.

    Raises:
        `NeVAError`: If the scenarios do not contrast the values, or the model is of a kind that cannot be edited.

    Example:

    ```py
    >>> from neva_hf import identify_neurons, load_base
    >>> model, tokenizer = load_base()  # doctest: +SKIP
    >>> neuron_map = identify_neurons(model, tokenizer, values=["benevolence", "power"])  # doctest: +SKIP
    >>> neuron_map.save_pretrained("my-map")  # doctest: +SKIP
    ```
    """
    if neva_layers(model):
        raise NeVAError("The model has a neuron map loaded already: identify on its base model (model.unload()).")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise NeVAError("The model has adapters: merge them into it first (model.merge_and_unload()), or unload them.")
    started = time.time()
    scenarios = load_scenarios() if scenarios is None else list(scenarios)
    if not isinstance(values, str):
        values = list(scenario_values(scenarios) if values is None else values)
    values = check_value_names(values)
    texts = load_neutral_texts() if neutral_texts is None else list(neutral_texts)
    if isinstance(score, str) and score not in SCORES:
        raise NeVAError(f"There is no score {score!r}: choose one of {sorted(SCORES)}, or pass a function.")
    scoring = SCORES[score] if isinstance(score, str) else score

    # What is wrong with the request is said before the long pass, not after it.
    projections = find_down_projections(model)
    layers = middle_layers(len(projections)) if layers is None else list(layers)
    check_request(neurons, layers, len(projections), min(layer_sizes(module)[0] for module in projections.values()))

    if not 0 <= leakage_penalty <= 1e6:
        raise NeVAError(f"`leakage_penalty` must be 0 or a positive number, got {leakage_penalty!r}.")
    if not 1 <= samples <= 1_000_000:
        raise NeVAError(f"`samples` must be a whole number from 1 to a million, got {samples!r}.")

    gains = leakage_penalty > 0 and (len(scenarios) >= _ENOUGH_FOR_GAINS if gains is None else gains)

    # Values that are not asked for are kept still as well.
    heard = [value for value in scenario_values(scenarios) if value not in values] if leakage_penalty > 0 else []
    statistics = collect(
        model,
        tokenizer,
        scenarios,
        [*values, *heard],
        checkpoint=None if checkpoint is None else Path(checkpoint),
        probes=scoring is probe and leakage_penalty == 0,
        gains=gains,
        progress=progress,
    )
    if leakage_penalty > 0:

        def beside(name: str) -> Path | None:
            return None if checkpoint is None else Path(f"{os.fspath(checkpoint)}.{name}")

        drawn = fisher_samples(
            model,
            tokenizer,
            texts,
            samples=samples,
            seed=seed,
            gains=gains,
            checkpoint=beside("fisher"),
            progress=progress,
        )
        own = None
        if gains:
            own = reply_samples(
                model,
                tokenizer,
                scenarios,
                values,
                candidates(statistics, drawn, len(values), neurons, leakage_penalty, layers),
                seed=seed,
                gains=True,
                checkpoint=beside("replies"),
                progress=progress,
            )
        chosen, edits = balanced_neurons(
            statistics, drawn, len(values), neurons, leakage_penalty, layers, own, progress=progress
        )
    else:
        scored = scoring(with_logits_per_unit(model, statistics) if scoring is probe else statistics)
        chosen, edits = top_neurons(scored.score, neurons, layers), scored.shift
    config = NeVAConfig(
        base_model_name_or_path=getattr(model, "name_or_path", None) or None,
        values=values,
        base=describe_base(model),
        value_system=None if value_system is None else value_system.to_dict(),
        provenance={
            "method": "neva",
            "score": _name_of(score) if leakage_penalty == 0 else "balanced",
            "leakage_penalty": leakage_penalty,
            "neurons": neurons,
            "layers": layers,
            "target_kl": target_kl,
            "scenarios": len(scenarios),
            "scenarios_sha256": scenarios_hash(scenarios),
            "neutral_texts": len(texts),
            **({"samples": samples, "gains": gains} if leakage_penalty > 0 else {}),
            "seed": seed,
            "base_revision": getattr(model.config, "_commit_hash", None),
            "versions": {
                "neva_hf": __version__,
                "peft": peft.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        },
    )
    neuron_map = build_map(edits, chosen, statistics.modules, config)
    neuron_map = calibrated(
        model,
        tokenizer,
        neuron_map,
        texts,
        target_kl=target_kl,
        dose_scenarios=dose_scenarios,
        progress=progress,
        started=started,
    )
    # After calibration: a gated edit saturates, and may not reach the wanted divergence however strong it is.
    return train_gates(model, tokenizer, neuron_map, scenarios, progress=progress) if gates else neuron_map


def _name_of(score: str | Callable[[Statistics], Scored]) -> str:
    return score if isinstance(score, str) else getattr(score, "__name__", "function")


def calibrated(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    neuron_map: NeuronMap,
    texts: Sequence[str],
    *,
    target_kl: float = TARGET_KL,
    dose_scenarios: Sequence[Scenario] = (),
    progress: Progress[Any] = no_progress,
    started: float | None = None,
) -> NeuronMap:
    """The same map with units, ranges and measurements found on some texts. The model is left as it was."""
    measurements: dict[str, Any] = {}
    # (putting a map on sets evaluation mode and may freeze the model, and unloading undoes neither)
    with left_as_it_was(model):
        edited = NeVAModel.from_map(model, neuron_map)
        try:
            found = calibrate(edited, tokenizer, texts, target_kl=target_kl, progress=progress)
            measurements["calibration"] = found.measured
            if dose_scenarios:
                measurements["dose"] = dose_curves(
                    edited, tokenizer, dose_scenarios, spread(texts, _DOSE_TEXTS), progress=progress
                )
        finally:
            edited.unload()
    if started is not None:
        measurements["seconds"] = round(time.time() - started, 1)
    config = replace(neuron_map.config, units=found.units, ranges=found.ranges, measurements=measurements)
    return NeuronMap(config, neuron_map.modules)
