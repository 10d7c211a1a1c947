"""How the speed benchmarks measure: in turn, in one process, with medians, spread and ratios of the same round.

A machine's speed wanders while a benchmark runs. So everything that is compared runs once in every round, in an order that
changes from round to round, and what is reported beside the medians is the median of the rounds' own ratios.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Spread:
    """A median with the quartiles around it.

    Args:
        median (`float`): The median.
        low (`float`): The lower quartile.
        high (`float`): The upper quartile.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.low:.4g} to {self.high:.4g})"


def spread(numbers: Sequence[float], digits: int = 6) -> Spread:
    """The median and the quartiles of some numbers."""
    if len(numbers) == 1:
        return Spread(*[round(numbers[0], digits)] * 3)
    low, middle, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return Spread(round(middle, digits), round(low, digits), round(high, digits))


def wait(device: torch.device | None = None) -> None:
    """Waits until an accelerator has done what it was given; nothing to wait for on a CPU."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device | None = None) -> float:
    """How long one run takes, until the device is done."""
    wait(device)
    started = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - started


def in_turn(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 1,
    device: torch.device | None = None,
) -> dict[str, list[float]]:
    """Times some runs in turn.

    Args:
        runs (`Mapping[str, Callable]`): Name -> what is timed.
        rounds (`int`): How often each is timed.
        warmup (`int`): How often each runs before.
        device (`torch.device`, *optional*): What to wait for.

    Returns:
        `dict[str, list[float]]`: Name -> seconds, one number per round.
    """
    order, shuffle = list(runs), random.Random(0).shuffle
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(warmup):
        for run in runs.values():
            run()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                found[name].append(seconds(runs[name], device))
    finally:
        if collecting:
            gc.enable()
    return found


def compared(times: Mapping[str, Sequence[float]], base: str, per: int = 1) -> dict[str, dict[str, Any]]:
    """What times say beside those of one of the runs.

    Args:
        times (`Mapping[str, Sequence[float]]`): From [`in_turn`].
        base (`str`): The run that the others are held against.
        per (`int`): How many equal steps one run is.

    Returns:
        `dict[str, dict]`: Name -> `ms` (per step) and `ratio` (to the base in the same round), as plain data of [`Spread`].
    """
    return {
        name: {
            "ms": asdict(spread([1000 * one / per for one in found])),
            "ratio": asdict(spread([one / other for one, other in zip(found, times[base], strict=True)], 4)),
        }
        for name, found in times.items()
    }


def shown(found: Mapping[str, float]) -> str:
    """A [`Spread`] that became plain data, as text."""
    return str(Spread(**found))


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The hardware and what it runs, without any name that someone gave it."""
    import transformers

    device = torch.device(device)
    found = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def machine_line(found: Mapping[str, Any]) -> str:
    """The machine in one sentence."""
    cpu = f"{found['cpu']}, {found['cores']} cores, {found['threads']} thread(s)"
    what = f"{found['gpu']} (CUDA {found['cuda']}; {cpu})" if "gpu" in found else cpu
    busy = f" The load when it began was {found['load']}." if found.get("load") is not None else ""
    return f"On {what}, torch {found['torch']}, transformers {found['transformers']}.{busy}"


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def write(name: str, found: Mapping[str, Any], lines: Sequence[str], folder: Path = RESULTS) -> None:
    """Writes what was found as JSON and as Markdown, and prints the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
