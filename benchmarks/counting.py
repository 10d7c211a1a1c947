"""What a model does, counted rather than timed: operations, kernels, compiled graphs, calls of Python functions.

Counts are the same on every machine, so the tests hold them (tests/test_speed_counts.py) and the benchmarks report them.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Operations:
    """The operations of a run.

    Args:
        work (`Counter[str]`): Those that compute or copy, such as `mm`. On an accelerator each starts a kernel or more.
        views (`Counter[str]`): Those that only look at memory in another way, such as `transpose`.
        made (`Counter[tuple[int, ...]]`): The shapes of the tensors that those of the first kind made.
    """

    work: Counter[str] = field(default_factory=Counter)
    views: Counter[str] = field(default_factory=Counter)
    made: Counter[tuple[int, ...]] = field(default_factory=Counter)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found = Operations()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        name = schema.name.removeprefix("aten::")
        aliases = [argument.alias_info for argument in schema.arguments if argument.alias_info is not None]
        if name == "_unsafe_view" or any(not alias.is_write for alias in aliases):
            self.found.views[name] += 1
            return result
        self.found.work[name] += 1
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.found.made[tuple(tensor.shape)] += 1
        return result


def operations(run: Callable[[], object]) -> Operations:
    """Counts the operations of a run.

    Args:
        run (`Callable`): What to run. It is run without gradients.

    Returns:
        [`Operations`]: The counts.
    """
    with torch.no_grad(), _Recorder() as recorder:
        run()
    return recorder.found


def more(found: Operations, base: Operations) -> dict[str, int]:
    """The operations that one run has more of than another (positive) or fewer (negative), views apart."""
    names = sorted(found.work.keys() | base.work.keys())
    return {name: found.work[name] - base.work[name] for name in names if found.work[name] != base.work[name]}


def kernels(run: Callable[[], object], device: torch.device) -> int | None:
    """How many kernels and copies a run starts on an accelerator, by torch's profiler; `None` on a CPU."""
    if device.type != "cuda":
        return None
    run()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize(device)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiled.events())


@dataclass
class Graphs:
    """What the compiler did inside [`compiling`].

    Args:
        graphs (`int`): How many graphs it made.
        breaks (`int`): How often it had to give up on a graph.
    """

    graphs: int = 0
    breaks: int = 0


@contextmanager
def compiling() -> Iterator[Graphs]:
    """Counts the graphs that torch's compiler makes inside, and how often it breaks one."""
    counters = torch._dynamo.utils.counters
    found = Graphs()
    before = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    yield found
    found.graphs = counters["stats"]["unique_graphs"] - before[0]
    found.breaks = sum(counters["graph_break"].values()) - before[1]


def python_calls(run: Callable[[], object], files: Sequence[str]) -> Counter[str]:
    """How often a run calls each Python function of some files.

    Args:
        run (`Callable`): What to run.
        files (`Sequence[str]`): Parts of the paths of the files, such as `neva_hf/`.

    Returns:
        `Counter[str]`: Function -> calls.
    """
    found: Counter[str] = Counter()

    def count(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and any(part in frame.f_code.co_filename for part in files):
            found[frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(before)
    return found
