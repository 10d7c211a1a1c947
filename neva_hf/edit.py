"""What one layer adds to its output, made ready once and used at every token.

Invariants:
- Only outputs are shifted. An edit `delta` of the inputs `index` of a down projection is the shift `delta @ columns`,
  where `columns[i]` is what a unit of neuron `index[i]` writes. Rows without an edit keep every bit.
- **Folded** edits (shifts alone) do not depend on the activations: one bias `[hidden]` for all rows, or one per row.
- **General** edits (gains, gates) gather the k edited inputs; there is never a dense copy of the activations.
- Nothing here looks at numbers on an accelerator, and the work in Python does not grow with tokens.

Formula (DESIGN section 2): neuron x becomes `x + s * (shift + gain * x)` at coefficient s.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from .errors import NeVAError


@dataclass(frozen=True)
class GeneralEdit:
    """An edit that depends on the activations: with gains, with gates, or with both. `V` values, `k` neurons.

    Args:
        index (`torch.Tensor`): Edited input features, int64 `[k]`.
        columns (`torch.Tensor`): What a unit of each edited neuron writes, `[k, hidden]`, in the layer's dtype.
        coefficients (`torch.Tensor`): Float32 `[rows, V]`, rows 1 when all rows share them.
        shift (`torch.Tensor`): Float32 `[V, k]`.
        gain (`torch.Tensor`, *optional*): Float32 `[V, k]`.
        gate_weight (`torch.Tensor`, *optional*): Probe weights, float32 `[V, k]`.
        gate_bias (`torch.Tensor`, *optional*): Probe biases, float32 `[V]`.
        gate_logit (`float`): The logit that the probes are brought to.
        untouched (`torch.Tensor`, *optional*): Bool `[rows, 1]`, the rows without an edit. `None` where all rows share
            an edit.
    """

    index: torch.Tensor
    columns: torch.Tensor
    coefficients: torch.Tensor
    shift: torch.Tensor
    gain: torch.Tensor | None
    gate_weight: torch.Tensor | None
    gate_bias: torch.Tensor | None
    gate_logit: float
    untouched: torch.Tensor | None


@dataclass(frozen=True)
class LayerEdit:
    """Everything that one layer adds.

    Args:
        bias (`torch.Tensor`, *optional*): The folded edits, `[rows, hidden]`, rows 1 when all rows share it.
        fused (`torch.Tensor`, *optional*): Base bias plus folded edit, `[hidden]`: in place of `bias` where the base
            layer is a plain linear one and all rows share the edit.
        general (`tuple[GeneralEdit, ...]`): The edits that depend on the activations.
    """

    bias: torch.Tensor | None = None
    fused: torch.Tensor | None = None
    general: tuple[GeneralEdit, ...] = ()

    @property
    def rows(self) -> int:
        """How many rows of strengths there are, 1 if all rows of a batch share them."""
        found = [edit.coefficients for edit in self.general] + ([] if self.bias is None else [self.bias])
        return max((tensor.shape[0] for tensor in found), default=1)

    def slots(self) -> list[torch.Tensor | None]:
        """All tensors in a fixed order, `None` for those that are not there."""
        found = [self.bias, self.fused]
        for edit in self.general:
            found += [edit.index, edit.columns, edit.coefficients, edit.shift, edit.untouched]
            found += [edit.gain, edit.gate_weight, edit.gate_bias]
        return found

    def tensors(self) -> list[torch.Tensor]:
        """All tensors that are there, in a fixed order."""
        return [tensor for tensor in self.slots() if tensor is not None]


class Call(threading.local):
    """What the running call of each thread dials in one layer: an edit, or `None` for none, while `running`.

    Each layer holds its own. (One dict of all layers would do in eager mode, but `torch.compile` remembers the place of a
    key rather than the key, so layers that share compiled code would share an edit; and it cannot trace a context
    variable.)
    """

    def __init__(self) -> None:
        # Runs anew in every thread. (Defaults in the class would do in eager mode, but the guards of `torch.compile` do
        # not see when a thread begins to override them.)
        self.running = False
        self.edit: LayerEdit | None = None

    def __reduce__(self) -> tuple[type[Call], tuple[()]]:
        # Copies of a layer have calls of their own.
        return type(self), ()


def same_layout(old: LayerEdit, new: LayerEdit) -> bool:
    """Whether the numbers of one edit can be written into the tensors of the other."""
    layouts = [
        [None if tensor is None else (tensor.shape, tensor.device, tensor.dtype) for tensor in edit.slots()]
        for edit in (old, new)
    ]
    gates = [[general.gate_logit for general in edit.general] for edit in (old, new)]
    return layouts[0] == layouts[1] and gates[0] == gates[1]


def add_folded(output: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Adds a folded edit to a layer's output.

    Args:
        output (`torch.Tensor`): `[rows * n, ..., hidden]`. Each row owns a block of n neighbours: beams and returned
            sequences repeat rows in place, and models that flatten batch and tokens lay out a row's tokens in a block.
        bias (`torch.Tensor`): `[rows, hidden]`.

    Returns:
        `torch.Tensor`: Of the output's shape.

    Raises:
        `NeVAError`: If the output's rows are no multiple of the edit's.
    """
    if bias.shape[0] == 1:
        return output + bias[0]
    return (_blocks(output, bias.shape[0]) + _beside_blocks(bias, output.dim())).reshape(output.shape)


def add_general(output: torch.Tensor, x: torch.Tensor, edit: GeneralEdit) -> torch.Tensor:
    """Adds a general edit to a layer's output.

    Args:
        output (`torch.Tensor`): What the base layer made of `x`, `[rows * n, ..., hidden]`.
        x (`torch.Tensor`): The base layer's input, `[rows * n, ..., d_ff]`.
        edit ([`GeneralEdit`]): The edit.

    Returns:
        `torch.Tensor`: Of the output's shape.

    Raises:
        `NeVAError`: If the batch is no multiple of the edit's rows.
    """
    rows = edit.coefficients.shape[0]
    selected = _blocks(x.index_select(-1, edit.index), rows).to(edit.shift.dtype)
    amounts = _beside_blocks(edit.coefficients, x.dim())
    if edit.gate_weight is not None:
        amounts = amounts * _gate(edit, selected, amounts)
    delta = amounts @ edit.shift
    if edit.gain is not None:
        delta = delta + (amounts @ edit.gain) * selected
    written = delta.to(edit.columns.dtype) @ edit.columns
    if edit.untouched is not None:
        written = torch.where(_beside_blocks(edit.untouched, x.dim()), -0.0, written)
    return (_blocks(output, rows) + written.to(output.dtype)).reshape(output.shape)


def _gate(edit: GeneralEdit, selected: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
    """How much of each value's edit a token needs, `[..., V]` from 0 to 1 (ours; DESIGN section 6, "Gate").

    With the probe's logit `z = w.x + b`, the full edit at coefficient c moves it by `c * (w.shift + (w*gain).x)`. The
    fraction that brings it to the wanted logit is used (for negative c, to minus that logit): 0 where it is there
    already, and the whole edit where even that does not reach it.
    """
    assert edit.gate_weight is not None
    assert edit.gate_bias is not None
    logit = selected @ edit.gate_weight.T + edit.gate_bias
    slope = (edit.gate_weight * edit.shift).sum(-1)
    if edit.gain is not None:
        slope = slope + selected @ (edit.gate_weight * edit.gain).T
    sign = torch.sign(amounts)
    missing = edit.gate_logit - sign * logit
    step = sign * amounts * slope
    fraction = torch.where(step > 0, missing / step.clamp(min=1e-30), 1.0)
    return torch.where(missing > 0, fraction.clamp(0, 1), 0.0)


def _blocks(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """`[rows * n, ...]` -> `[rows, n, ...]`."""
    check_multiple(tensor.shape[0], rows)
    return tensor.unflatten(0, (rows, tensor.shape[0] // rows))


def check_multiple(batch: int, rows: int) -> None:
    """Refuses a batch that cannot be divided among rows of strengths."""
    if batch % rows != 0:
        raise NeVAError(
            f"Strengths were given for {rows} rows, but the model was run on a batch of {batch}, which is no multiple "
            "of that. Pass one dict of strengths per row of the inputs, or one dict for all."
        )


def _beside_blocks(per_row: torch.Tensor, dims: int) -> torch.Tensor:
    """`[rows, features]` -> `[rows, 1, ..., 1, features]`, to meet a tensor of `dims` dimensions cut into blocks."""
    return per_row.reshape(per_row.shape[0], *([1] * (dims - 1)), per_row.shape[1])
