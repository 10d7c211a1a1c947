"""Replies of a scenario in groups of like length, so that little of what runs is padding.

A second group is a second forward and backward pass: a cut is made only where it saves more tokens than could be run in
the time that such passes take besides.
"""

from __future__ import annotations

import torch

from neva_hf.measure import EncodedScenario


def length_groups(encoded: EncodedScenario, worth: int) -> list[list[int]]:
    """Cuts the replies of a scenario in two, the shorter ones first, or leaves them together.

    Args:
        encoded ([`EncodedScenario`]): The scenario.
        worth (`int`): How many tokens a cut must save; see [`worth_of_a_pass`].

    Returns:
        `list[list[int]]`: The numbers of the replies, in order within each group.

    Example:

    ```py
    >>> from neva_hf.identify.lengths import length_groups
    >>> length_groups(encoded, worth=32)  # doctest: +SKIP
    [[0, 1, 2, 5, 7, 8], [3, 4, 6, 9]]
    ```
    """
    # (the last token of a reply runs through nothing)
    lengths = [int(row.sum()) - 1 for row in encoded.mask]
    order = sorted(range(len(lengths)), key=lambda number: lengths[number])
    longest = lengths[order[-1]]
    saved = {cut: cut * (longest - lengths[order[cut - 1]]) for cut in range(1, len(order))}
    cut = max(saved, key=lambda cut: saved[cut], default=0)
    if not cut or saved[cut] < worth:
        return [list(range(len(lengths)))]
    return [sorted(order[:cut]), sorted(order[cut:])]


def worth_of_a_pass(device: torch.device) -> int:
    """How many tokens could be run in the time that a pass takes besides: few on a CPU, many where kernels are started."""
    return 32 if device.type == "cpu" else 1024


def only(encoded: EncodedScenario, rows: list[int]) -> EncodedScenario:
    """A scenario with some of its replies, padded to the longest of them."""
    width = int(encoded.mask[rows].sum(1).max())
    keys = [encoded.keys[row] for row in rows]
    return EncodedScenario(encoded.prompt, encoded.replies[rows, :width], encoded.mask[rows, :width], keys)
