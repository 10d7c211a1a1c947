"""From what people write, `{"benevolence": 1.0}` or one such dict per row, to a checked tensor.

Invariant: what leaves this file is finite, float32, on the CPU, and has one column per value. Everything that decides
between paths (is anything dialled at all? are all rows alike?) is decided on these CPU numbers, so that dialling never
waits for an accelerator.
"""

from __future__ import annotations

import difflib
import math
import numbers
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch

from .errors import NeVAError

MAX_STRENGTH = 1e6

Strengths: TypeAlias = Mapping[str, float]
"""Value name -> strength. Values that are not named are at 0."""

RowStrengths: TypeAlias = Strengths | Sequence[Strengths]
"""One [`Strengths`] for all rows of a batch, or one per row."""


def unknown_value_message(name: object, values: Sequence[str]) -> str:
    """The sentence that tells someone that a value is not in the map, with the nearest name that is.

    Example:

    ```py
    >>> from neva_hf.strengths import unknown_value_message
    >>> unknown_value_message("benevolance", ["benevolence", "power"])
    "This map has no value 'benevolance' (did you mean 'benevolence'?). It has: benevolence, power."
    ```
    """
    near = difflib.get_close_matches(str(name), values, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"This map has no value {name!r:.80}{hint}. It has: {', '.join(values)}."


def _check_one(strengths: Strengths, values: Sequence[str], where: str) -> None:
    if not isinstance(strengths, Mapping):
        raise NeVAError(
            f"Strengths{where} must be a dict such as {{'{values[0]}': 1.0}}, got {type(strengths).__name__}. "
            "For several rows pass a list with one dict per row."
        )
    for name, strength in strengths.items():
        if name not in values:
            raise NeVAError(f"{unknown_value_message(name, values)}{f' (strengths{where})' if where else ''}")
        if isinstance(strength, bool) or not isinstance(strength, numbers.Real):
            raise NeVAError(f"The strength of {name!r}{where} must be a number, got {strength!r:.80}.")
        # (Ordered comparisons, since a whole number may be too large for a float.)
        if not -math.inf < strength < math.inf:
            raise NeVAError(f"The strength of {name!r}{where} must be finite, got {strength!r}.")
        if not -MAX_STRENGTH <= strength <= MAX_STRENGTH:
            raise NeVAError(
                f"The strength of {name!r}{where} is too large: {strength!r:.40}. Strengths of about 1 are the "
                f"calibrated unit, {MAX_STRENGTH:g} is the limit."
            )


def _warn_beyond(strengths: Strengths, ranges: Mapping[str, Sequence[float]], where: str) -> None:
    for name, strength in strengths.items():
        if name in ranges and not ranges[name][0] <= strength <= ranges[name][1]:
            low, high = ranges[name]
            warnings.warn(
                f"The strength {strength:g} of {name!r}{where} is outside the range in which this map is known to "
                f"stay fluent, {low:g} to {high:g}. Expect worse text, and more leakage to other values.",
                UserWarning,
                stacklevel=4,
            )


@contextmanager
def no_range_warnings() -> Iterator[None]:
    """For what shows or measures on purpose what lies beyond the fluent range, and says so itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*outside the range in which this map is known", category=UserWarning
        )
        yield


def parse_strengths(
    strengths: RowStrengths | None,
    values: Sequence[str],
    *,
    rows: int | None = None,
    ranges: Mapping[str, Sequence[float]] | None = None,
) -> torch.Tensor:
    """Checks strengths and lays them out as a tensor.

    Args:
        strengths (`dict[str, float]`, `list[dict[str, float]]` or `None`):
            Strengths by value name, for all rows or one dict per row. `None` and `{}` mean no edit.
        values (`Sequence[str]`):
            The values of the map, one column each.
        rows (`int`, *optional*):
            The number of rows of the batch. A list of strengths must have as many.
        ranges (`Mapping[str, Sequence[float]]`, *optional*):
            Lowest and highest fluent strength per value; a strength outside is warned about, not refused.

    Returns:
        `torch.Tensor`: Float32 on the CPU, `[1, len(values)]` for strengths that all rows share (also when a list holds
        the same strengths for every row), else `[rows, len(values)]`.

    Raises:
        `NeVAError`: For an unknown value, a strength that is no finite number, or a wrong number of rows.

    Example:

    ```py
    >>> from neva_hf.strengths import parse_strengths
    >>> parse_strengths([{"power": 1}, {}], ["benevolence", "power"], rows=2)
    tensor([[0., 1.],
            [0., 0.]])
    ```
    """
    if strengths is None:
        strengths = {}
    per_row = not isinstance(strengths, Mapping)
    if per_row and (isinstance(strengths, (str, bytes)) or not isinstance(strengths, Sequence)):
        raise NeVAError(
            f"Strengths must be a dict such as {{'{values[0]}': 1.0}} or a list with one dict per row, "
            f"got {type(strengths).__name__}."
        )
    listed: Sequence[Strengths] = strengths if per_row else [strengths]  # type: ignore[list-item,assignment]
    if not listed:
        raise NeVAError("The list of strengths is empty: it must hold one dict per row of the batch.")
    if per_row and rows is not None and len(listed) != rows:
        raise NeVAError(
            f"Got strengths for {len(listed)} rows, but the batch has {rows}: pass one dict per row of the inputs "
            "(before beams and returned sequences are expanded), or one dict for all."
        )
    for number, row in enumerate(listed):
        where = f" of row {number}" if per_row else ""
        _check_one(row, values, where)
        if ranges:
            _warn_beyond(row, ranges, where)
    table = torch.tensor([[float(row.get(name, 0.0)) for name in values] for row in listed], dtype=torch.float32)
    return table[:1] if bool((table == table[:1]).all()) else table


def scale_by_units(table: torch.Tensor, values: Sequence[str], units: Mapping[str, Sequence[float]]) -> torch.Tensor:
    """Strengths -> coefficients of the edit, by the calibrated unit of each value and sign.

    Args:
        table (`torch.Tensor`): Strengths, `[rows, len(values)]`, float32.
        values (`Sequence[str]`): The values of the columns.
        units (`Mapping[str, Sequence[float]]`): Per value the factor of negative and of positive strengths.

    Returns:
        `torch.Tensor`: Coefficients of the same shape.

    Example:

    ```py
    >>> import torch
    >>> from neva_hf.strengths import scale_by_units
    >>> scale_by_units(torch.tensor([[-1.0], [1.0]]), ["power"], {"power": [0.5, 1.0]})
    tensor([[-0.5000],
            [ 1.0000]])
    ```
    """
    factors = torch.tensor([list(units.get(name, (1.0, 1.0))) for name in values], dtype=table.dtype)
    return torch.where(table < 0, table * factors[:, 0], table * factors[:, 1])
