"""Several processes at one pass: each takes a share of the work, and sums add up.

Under `accelerate launch` (GPUs) or `torchrun` (also CPUs, for which `accelerate launch` starts a single process) every
process runs the same program; alone, a process gets all of the work and sums stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from accelerate import PartialState

Item = TypeVar("Item")


def processes() -> tuple[int, int]:
    """The number of this process, from 0, and how many there are."""
    if not torch.distributed.is_available() or not _launched():
        return 0, 1
    state = _state()
    return state.process_index, state.num_processes


def share(items: Sequence[Item]) -> list[Item]:
    """This process's part of the work: every n-th item.

    Example:

    ```py
    >>> from neva_hf.identify.parallel import share
    >>> share([1, 2, 3])
    [1, 2, 3]
    ```
    """
    number, count = processes()
    return list(items[number::count])


def add_up(tensors: Sequence[torch.Tensor]) -> None:
    """Adds tensors over all processes, in place.

    Args:
        tensors (`Sequence[torch.Tensor]`): CPU tensors, of the same shapes in every process.
    """
    if processes()[1] == 1:
        return
    device = _state().device
    for tensor in tensors:
        moved = tensor.to(device)
        torch.distributed.all_reduce(moved)
        tensor.copy_(moved)


def gathered(found: Sequence[Item]) -> list[Item]:
    """What all processes found for their [`share`] of some items, in the order of the items.

    Args:
        found (`Sequence`): One result for each item of this process's share; anything that can be pickled.

    Returns:
        `list`: One result for each item, the same list in every process.

    Example:

    ```py
    >>> from neva_hf.identify.parallel import gathered, share
    >>> gathered([one * 2 for one in share([1, 2, 3])])
    [2, 4, 6]
    ```
    """
    count = processes()[1]
    if count == 1:
        return list(found)
    parts: list[Any] = [None] * count
    _state()
    torch.distributed.all_gather_object(parts, list(found))
    return [parts[number % count][number // count] for number in range(sum(map(len, parts)))]


def _state() -> PartialState:
    # Without an accelerator accelerate must be told so, or each process takes itself to be alone.
    return PartialState(cpu=not torch.accelerator.is_available())


def _launched() -> bool:
    """Whether a launcher started this process: asking accelerate would set up its state in every ordinary program."""
    import os

    return int(os.environ.get("WORLD_SIZE", "1")) > 1
