"""A neuron map beside what people use instead: fitted, calibrated and evaluated on the same model, all in one run.

All methods learn from the same scenarios by the same competing contrast, are scaled to the same KL divergence on the same
neutral texts, and are measured on the same unseen scenarios. They are fitted on the base model before the map is put on it.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from neva_hf._version import __version__
from neva_hf.baselines import METHODS, Dials, Evidence, Method, calibrated, from_model, random_neurons
from neva_hf.errors import NeVAError
from neva_hf.identify.calibrate import TARGET_KL
from neva_hf.model import NeVAModel
from neva_hf.neuron_map import NeuronMap
from neva_hf.scenarios import Scenario, scenarios_hash

from .candidate import Candidate
from .kept import Kept, fingerprint, map_fingerprint, model_fingerprint
from .run import evaluate

# What fitting costs, in passes over the training scenarios: reading them, and the rounds of calibration.
_FIT_PASSES = 3.0


def baseline_names(wanted: str | Sequence[str]) -> list[str]:
    """The names of baselines, from what people write.

    Args:
        wanted (`str` or `Sequence[str]`): `"all"`, or names in any case, with hyphens, underscores or spaces.

    Returns:
        `list[str]`: Keys of `METHODS`, each once.

    Raises:
        `NeVAError`: For a name that is none.

    Example:

    ```py
    >>> from neva_hf.evaluation.compare import baseline_names
    >>> baseline_names(["caa", "system-prompt"])
    ['CAA', 'System prompt']
    ```
    """
    if wanted in ("all", ["all"], ("all",)):
        return list(METHODS)
    known = {_plain(name): name for name in METHODS}
    found = []
    for name in [wanted] if isinstance(wanted, str) else wanted:
        if _plain(name) not in known:
            near = difflib.get_close_matches(_plain(name), known, n=1)
            hint = f" (did you mean {known[near[0]]!r}?)" if near else ""
            raise NeVAError(f"There is no method {name!r:.80}{hint}: choose among {', '.join(METHODS)}, or all.")
        found.append(known[_plain(name)])
    return list(dict.fromkeys(found))


def map_candidate(model: nn.Module, neuron_map: NeuronMap, name: str = "NeVA") -> Candidate:
    """A neuron map as what is evaluated; it is put on the model, in place, when it is needed."""

    def make() -> Method:
        return from_model(NeVAModel.from_map(model, neuron_map), name)

    return Candidate(name, list(neuron_map.values), make, map_fingerprint(neuron_map), changes_model=True)


def baseline_candidates(
    names: Sequence[str],
    evidence: Evidence,
    *,
    neuron_map: NeuronMap | None = None,
    target_kl: float = TARGET_KL,
    checkpoint: str | os.PathLike[str] | None = None,
) -> list[Candidate]:
    """Baselines as what is evaluated, fitted and calibrated when they are needed.

    Args:
        names (`Sequence[str]`): Keys of `METHODS`.
        evidence ([`Evidence`]): What they are fitted on.
        neuron_map ([`NeuronMap`], *optional*): The map that they stand beside: random neurons are as many, with shifts as
            large.
        target_kl (`float`): What strengths +1 and -1 cost, nats per token.
        checkpoint (`str` or `os.PathLike`, *optional*): A folder that keeps what calibration found.

    Returns:
        `list[Candidate]`: One per name.
    """
    agreed = {
        "version": __version__,
        "train": scenarios_hash(evidence.train),
        "dev": scenarios_hash(evidence.dev),
        "texts": fingerprint(list(evidence.texts)),
        "values": evidence.values,
        "seed": evidence.seed,
        "target_kl": target_kl,
    }
    cost = _FIT_PASSES * sum(sum(map(len, one.replies.values())) / 4 for one in evidence.train)

    def candidate(name: str) -> Candidate:
        fit, key = METHODS[name], fingerprint([name, agreed])
        if fit is random_neurons and neuron_map is not None:
            fit, key = partial(random_neurons, neuron_map=neuron_map), fingerprint([key, map_fingerprint(neuron_map)])

        def make() -> Method:
            folder = None if checkpoint is None else Path(checkpoint)
            kept = Kept(folder, "calibration", [model_fingerprint(evidence.model), key])
            fitted = fit(evidence)
            if "notes" not in kept:
                kept.put(
                    "notes",
                    calibrated(
                        fitted,
                        evidence.model,
                        evidence.tokenizer,
                        evidence.texts,
                        target_kl=target_kl,
                        progress=evidence.progress,
                    ).notes,
                )
            # (also when it was just found, so that it makes no difference whether a run was interrupted)
            return replace(rescaled(fitted, kept["notes"]["units"]), name=name, notes=kept["notes"])

        return Candidate(name, list(evidence.values), make, key, fit_cost=cost)

    return [candidate(name) for name in names]


def rescaled(method: Method, units: Mapping[str, Sequence[float]]) -> Method:
    """A method in calibrated strengths.

    Args:
        method ([`Method`]): The method; one that is not scalable stays as it is.
        units (`Mapping[str, Sequence[float]]`): Value -> the coefficients of strengths -1 and +1.

    Returns:
        [`Method`]: The same method.
    """
    if not method.scalable:
        return method

    @contextmanager
    def at(rows: Sequence[Dials]) -> Iterator[None]:
        with method.at([{name: s * units[name][s > 0] for name, s in row.items()} for row in rows]):
            yield

    return replace(method, at=at)


def compare(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    scenarios: Sequence[Scenario],
    *,
    neuron_map: NeuronMap | None = None,
    baselines: str | Sequence[str] = "all",
    evidence: Evidence,
    target_kl: float = TARGET_KL,
    checkpoint: str | os.PathLike[str] | None = None,
    tell: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> dict[str, Any]:
    """Fits and calibrates baselines, and evaluates them beside a neuron map in one run.

    Args:
        model (`nn.Module`): The base model, without adapters. A map is put on it in place.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        scenarios (`Sequence[Scenario]`): Scenarios that no method was fitted on.
        neuron_map ([`NeuronMap`], *optional*): The map, named `NeVA` in the report.
        baselines (`str` or `Sequence[str]`): `"all"` or names, see [`baseline_names`].
        evidence ([`Evidence`]): What baselines are fitted on.
        target_kl (`float`): What strengths +1 and -1 cost, nats per token.
        checkpoint (`str` or `os.PathLike`, *optional*): A folder that keeps finished pieces.
        tell (`Callable[[str], None]`): Gets a line before every piece.
        options (`Any`): As for [`evaluate`].

    Returns:
        `dict[str, Any]`: The report.

    Raises:
        `NeVAError`: If a method is unknown, or cannot be evaluated on the scenarios.
    """
    methods = [] if neuron_map is None else [map_candidate(model, neuron_map)]
    methods += baseline_candidates(
        baseline_names(baselines), evidence, neuron_map=neuron_map, target_kl=target_kl, checkpoint=checkpoint
    )
    return evaluate(methods, model, tokenizer, scenarios, checkpoint=checkpoint, tell=tell, **options)


def _plain(name: str) -> str:
    return "".join(sign for sign in name.lower() if sign.isalnum())
