"""An evaluation by names and paths: what a command asks for, also in several processes.

A [`Job`] holds only plain data, so it can be sent to another process, which loads the model itself and does its share of
the pieces. The first process does what is left when all are done (such as the pieces of one that was killed).
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from neva_hf.base import load_base
from neva_hf.baselines import Evidence
from neva_hf.errors import NeVAError
from neva_hf.identify.calibrate import TARGET_KL
from neva_hf.measure import Progress, no_progress
from neva_hf.neuron_map import NeuronMap
from neva_hf.scenarios import Scenario, load_neutral_texts, load_scenarios
from neva_hf.values import ValueSystem, available_value_systems, load_value_system

from .candidate import check_candidates, check_strengths
from .compare import baseline_candidates, baseline_names, map_candidate
from .extras import ExtraOptions, extras_of
from .kept import map_fingerprint
from .run import NEUTRAL_TEXTS, Run, silent
from .together import chosen_pairs


@dataclass(frozen=True)
class Job:
    """What to evaluate, and on what, by names and paths.

    Args:
        neuron_map (`str`): A folder or a repository.
        state (`Path`): The folder that keeps finished pieces.
        base (`str`, *optional*): The base model, if not the one that the map names.
        scenarios (`str`): A shipped set, a JSON Lines file, or a folder with `test.jsonl` (for baselines `train.jsonl`).
        split (`str`): The scenarios to evaluate on.
        limit (`int`, *optional*): At most so many of them, from the front.
        train_limit (`int`, *optional*): At most so many training scenarios for baselines.
        values (`list[str]`, *optional*): The values to dial; all of the map when `None`.
        strengths (`list[float]`): At which strengths.
        methods (`list[str]`): Baselines, see [`baseline_names`].
        pairs (`int` or `list[tuple[str, str]]`): See [`evaluate`].
        opposing (`bool`): See [`evaluate`].
        dose (`bool`): Whether to measure dose curves; those that the map has are reported anyway.
        few (`int`): See [`evaluate`].
        texts (`int`): Held-out neutral texts that damage is measured on.
        seed (`int`): For baselines, bootstrap and drawn pairs.
        device (`str`, *optional*): Where to run.
        dtype (`str`): The type to compute in.
        extras ([`ExtraOptions`]): Benchmarks and generated answers.
    """

    neuron_map: str
    state: Path
    base: str | None = None
    scenarios: str = "schwartz"
    split: str = "test"
    limit: int | None = None
    train_limit: int | None = None
    values: list[str] | None = None
    strengths: list[float] = field(default_factory=lambda: [1.0, -1.0])
    methods: list[str] = field(default_factory=list)
    pairs: int | list[tuple[str, str]] = 0
    opposing: bool = False
    dose: bool = False
    few: int = 6
    texts: int = NEUTRAL_TEXTS
    seed: int = 0
    device: str | None = None
    dtype: str = "auto"
    extras: ExtraOptions = field(default_factory=ExtraOptions)

    def prepare(
        self, part: int = 0, tell: Callable[[str], None] = silent, progress: Progress[Any] = no_progress
    ) -> Run:
        """Loads everything and checks it; what is wrong is said before the model is loaded, where that is possible.

        Args:
            part (`int`): The number of this process.
            tell (`Callable[[str], None]`): Gets a line before every piece.
            progress ([`Progress`]): Shows how far fitting is.

        Returns:
            [`Run`]: Ready to work.

        Raises:
            `NeVAError`: If something cannot be used.
        """
        neuron_map = NeuronMap.from_pretrained(self.neuron_map)
        scenarios = load_scenarios(self.scenarios, self.split, limit=self.limit)
        names = baseline_names(self.methods)
        values = list(self.values or neuron_map.values)
        strengths = check_strengths(self.strengths)
        train, dev = self._training() if names else ([], [])
        unloaded = map_candidate(torch.nn.Module(), neuron_map)
        check_candidates([unloaded], values, scenarios)
        if not isinstance(self.pairs, int):
            chosen_pairs(values, self.pairs)
        base, tokenizer = load_base(self.base or neuron_map.base_model, device=self.device, dtype=self.dtype)
        base.requires_grad_(False)
        system = system_of(neuron_map, values)
        target_kl = neuron_map.config.provenance.get("target_kl", TARGET_KL)
        evidence = Evidence(
            base,
            tokenizer,
            values,
            train,
            dev,
            load_neutral_texts("calibration"),
            self.seed,
            self.state / f"reading.{part}",
            progress,
        )
        measured = neuron_map.config.measurements.get("dose")
        return Run.of(
            [
                map_candidate(base, neuron_map),
                *baseline_candidates(
                    names, evidence, neuron_map=neuron_map, target_kl=target_kl, checkpoint=self.state
                ),
            ],
            base,
            tokenizer,
            scenarios,
            values=values,
            strengths=strengths,
            neutral_texts=load_neutral_texts("heldout", self.texts),
            pairs=self.pairs,
            opposing=self.opposing,
            dose=[-2.0, -1.0, -0.5, 0.5, 1.0, 2.0] if self.dose else measured,
            few=self.few,
            extras=extras_of(self.extras, base, tokenizer, scenarios, values, strengths[0], system, self.state),
            system=system,
            about=self._about(neuron_map, target_kl, train, dev),
            seed=self.seed,
            checkpoint=self.state,
            part=part,
            tell=tell,
        )

    def _training(self) -> tuple[list[Scenario], list[Scenario]]:
        if Path(self.scenarios).is_file():
            raise NeVAError(
                f"The other methods must be fitted on scenarios, but {self.scenarios} is a single file: name a "
                "folder with "
                "train.jsonl and test.jsonl (dev.jsonl, if it is there, is for choices such as a layer)."
            )
        train = load_scenarios(self.scenarios, "train", limit=self.train_limit)
        if self.split == "train":
            raise NeVAError(
                "The other methods are fitted on the train split: evaluate on another, such as --split test."
            )
        try:
            return train, load_scenarios(self.scenarios, "dev") if self.split != "dev" else []
        except NeVAError:
            return train, []

    def _about(
        self, neuron_map: NeuronMap, target_kl: float, train: Sequence[Scenario], dev: Sequence[Scenario]
    ) -> dict[str, Any]:
        provenance = neuron_map.config.provenance
        return {
            "map": {
                "name": Path(self.neuron_map).resolve().name if Path(self.neuron_map).exists() else self.neuron_map,
                "fingerprint": map_fingerprint(neuron_map),
                "base_model": neuron_map.base_model,
                "neurons": provenance.get("neurons"),
                "scenarios_sha256": provenance.get("scenarios_sha256"),
            },
            "target_kl": target_kl,
            "scenarios": {"set": Path(self.scenarios).name, "split": self.split},
            "fitted_on": {"train": len(train), "dev": len(dev)} if train else None,
        }


def system_of(neuron_map: NeuronMap, values: Sequence[str]) -> ValueSystem | None:
    """The value system of a map, or the first shipped one that knows its values."""
    given = neuron_map.config.value_system
    if given:
        try:
            return ValueSystem.from_dict(given)
        except NeVAError:
            return None
    for name in available_value_systems():
        system = load_value_system(name)
        if all(value in system for value in values):
            return system
    return None


# Work of more tokens than these is shared by the cores, where the model is small enough to be loaded by several processes.
_SHARED_FROM, _SMALL, _MOST = 100_000, 1_000_000_000, 4


def _processes(run: Run) -> int:
    """As many as torch has threads, for long work of a small model on the CPU: quicker than all threads in one."""
    parameters = list(run.model.parameters())
    small = sum(one.numel() for one in parameters) < _SMALL and parameters[0].device.type == "cpu"
    # (of all the work, not of what is left: an interrupted run goes on as it began)
    long = sum(piece.cost for piece in run.pieces.all()) > _SHARED_FROM
    return min(torch.get_num_threads(), _MOST) if small and long else 1


def run_job(
    job: Job,
    processes: int | None = None,
    tell: Callable[[str], None] = silent,
    progress: Progress[Any] = no_progress,
) -> dict[str, Any]:
    """Does a whole evaluation.

    Args:
        job ([`Job`]): What to do.
        processes (`int`, *optional*): How many processes share the work and the cores; each loads the model. `None`: one
            per core, up to four, for long work of a small model on the CPU.
        tell (`Callable[[str], None]`): Gets a line before every piece of the first process.
        progress ([`Progress`]): Shows how far fitting is.

    Returns:
        `dict[str, Any]`: The report.

    Raises:
        `NeVAError`: If something cannot be used.
    """
    if processes is not None and processes < 1:
        raise NeVAError(f"`processes` must be at least 1, got {processes}.")
    run = job.prepare(0, tell, progress)
    processes = _processes(run) if processes is None else processes
    if processes > 1:
        threads, shares = torch.get_num_threads(), run.shares(processes)
        each = max(threads // processes, 1)
        context = multiprocessing.get_context("spawn")
        others = [
            context.Process(target=_other, args=(job, part, shares[part], each), daemon=True)
            for part in range(1, processes)
            if shares[part]
        ]
        try:
            for other in others:
                other.start()
            torch.set_num_threads(each)
            run.work(shares[0])
            if others:
                tell("waiting for the other processes")
            for other in others:
                other.join()
        finally:
            torch.set_num_threads(threads)
            for other in others:
                if other.is_alive():
                    other.terminate()
        run.kept.refresh()
    # All of it, or what the others have not finished.
    run.work()
    return run.report()


def _other(job: Job, part: int, names: list[str], threads: int) -> None:
    """A process that shares the work. What goes wrong in it is met again, and said, by the first one."""
    torch.set_num_threads(threads)
    try:
        job.prepare(part).work(names)
    except (Exception, KeyboardInterrupt):
        os._exit(1)
