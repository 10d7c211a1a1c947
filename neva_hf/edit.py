"""What one layer adds to its output, made ready once and used at every token.

Invariants:
- Only outputs are shifted. An edit `delta` of the inputs `index` of a down projection is the shift `delta @ columns`,
  where `columns[i]` is what a unit of neuron `index[i]` writes. Rows without an edit keep every bit.
- **Folded** edits (shifts alone) do not depend on the activations: one bias `[hidden]` for all rows, or one per row.
- **General** edits (gains, gates) gather the k edited inputs; there is never a dense copy of the activations. All that
  depends on strengths alone is computed when these are set.
- Nothing here looks at numbers on an accelerator, and the work in Python does not grow with tokens.

Formula (DESIGN section 2): neuron x becomes `x + s * (shift + gain * x)` at coefficient s.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, fields

import torch

from .errors import NeVAError

# In place of slopes of gates that are smaller or negative: what is divided by it is beyond any coefficient.
_LEAST = 1e-20


@dataclass(frozen=True)
class GeneralEdit:
    """An edit that depends on the activations, made ready by [`general_edit`]. `V` values, `k` neurons.

    Args:
        index (`torch.Tensor`): Edited input features, int64 `[k]`.
        columns (`torch.Tensor`): What is written, in the layer's dtype: by a unit of each edited neuron, `[k, hidden]`, or,
            for gates without gains, by a unit of each value, `[V, hidden]`.
        scale (`torch.Tensor`, *optional*): Without gates: the gains of each row, `[rows, 1, k]` in the layer's dtype.
            `None` where all rows share them: they are in the columns then.
        probe (`torch.Tensor`, *optional*): With gates: float32 `[k, V]`, or `[k, 2 V]` with gains too.
        target (`torch.Tensor`, *optional*): What is added to the probes, float32 `[rows, 1, V or 2 V]`.
        lowest (`torch.Tensor`, *optional*): The least that a gate lets through, float32 `[rows, 1, V]`.
        highest (`torch.Tensor`, *optional*): The most.
        spread (`torch.Tensor`, *optional*): With gates and gains: shifts beside gains, float32 `[V, 2 k]`.
        untouched (`torch.Tensor`, *optional*): Bool `[rows, 1, 1]`, the rows without an edit. `None` where all rows
            share one.
    """

    index: torch.Tensor
    columns: torch.Tensor
    scale: torch.Tensor | None = None
    probe: torch.Tensor | None = None
    target: torch.Tensor | None = None
    lowest: torch.Tensor | None = None
    highest: torch.Tensor | None = None
    spread: torch.Tensor | None = None
    untouched: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        """How many rows of strengths there are, 1 if all rows of a batch share them."""
        return 1 if self.untouched is None else self.untouched.shape[0]


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
        return max([1 if self.bias is None else self.bias.shape[0], *(edit.rows for edit in self.general)])

    def slots(self) -> list[torch.Tensor | None]:
        """All tensors in a fixed order, `None` for those that are not there."""
        found = [self.bias, self.fused]
        for edit in self.general:
            found += [getattr(edit, item.name) for item in fields(edit)]
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
    return layouts[0] == layouts[1]


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
    rows = bias.shape[0]
    if rows == 1:
        return output + bias[0]
    return (_blocks(output, output.shape[0], rows) + bias[:, None]).reshape(output.shape)


def general_edit(
    *,
    index: torch.Tensor,
    columns: torch.Tensor,
    coefficients: torch.Tensor,
    shift: torch.Tensor,
    gain: torch.Tensor | None,
    gate_weight: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    gate_logit: float,
    untouched: torch.Tensor | None,
    dtype: torch.dtype,
) -> GeneralEdit:
    """Does ahead of time what does not depend on the activations.

    Gates (ours; DESIGN section 6, "Gate"): with the probe's logit `z = w.x + b`, the full edit at coefficient c moves it by
    `c * m` with `m = w.shift + (w*gain).x`. It is used as far as needed to bring z to the wanted logit g, for negative c to
    -g: 0 where it is there already, and the whole edit where even that does not reach it. So what is used of c is
    `(sign(c) * g - z) / m`, cut to the range from 0 to c; where m <= 0 the edit moves z the other way, and it is used
    whole or not at all.

    Args:
        index (`torch.Tensor`): Edited input features, int64 `[k]`.
        columns (`torch.Tensor`): What a unit of each of them writes, float32 `[k, hidden]`.
        coefficients (`torch.Tensor`): Float32 `[rows, V]`, rows 1 when all rows share them.
        shift (`torch.Tensor`): Float32 `[V, k]`. Without gates it is left out here: it is folded.
        gain (`torch.Tensor`, *optional*): Float32 `[V, k]`.
        gate_weight (`torch.Tensor`, *optional*): Probe weights, float32 `[V, k]`.
        gate_bias (`torch.Tensor`, *optional*): Probe biases, float32 `[V]`.
        gate_logit (`float`): The logit that the probes are brought to.
        untouched (`torch.Tensor`, *optional*): Bool `[rows]`, the rows without an edit; `None` where all rows share one.
        dtype (`torch.dtype`): What the layer computes in.

    Returns:
        [`GeneralEdit`]: The edit.
    """
    own = None if untouched is None else untouched[:, None, None]
    if gate_weight is None or gate_bias is None:
        assert gain is not None
        scale = coefficients @ gain
        if own is None:
            return GeneralEdit(index, (scale[0][:, None] * columns).to(dtype))
        return GeneralEdit(index, columns.to(dtype, copy=True), scale=scale[:, None].to(dtype), untouched=own)
    target = torch.sign(coefficients) * gate_logit - gate_bias
    slope = (gate_weight * shift).sum(-1)
    if gain is None:
        slope = slope.clamp(min=_LEAST)
        written, spread, probe, target = shift @ columns, None, -gate_weight.T / slope, target / slope
    else:
        written, spread = columns, torch.cat([shift, gain], dim=1)
        probe = torch.cat([-gate_weight, gate_weight * gain]).T
        target = torch.cat([target, slope.expand_as(target)], dim=1)
    return GeneralEdit(
        index,
        written.to(dtype, copy=True),
        probe=probe.contiguous(),
        target=target[:, None],
        lowest=coefficients.clamp(max=0)[:, None],
        highest=coefficients.clamp(min=0)[:, None],
        spread=spread,
        untouched=own,
    )


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
    rows = edit.rows
    used = _blocks(x.index_select(-1, edit.index), x.shape[0], rows)
    if edit.probe is not None:
        used = _gated_in_float32(used.to(edit.probe.dtype), edit)
    elif edit.scale is not None:
        used = used * edit.scale
    flat = output.reshape(-1, output.shape[-1])
    edited = torch.addmm(flat, used.flatten(0, 1).to(output.dtype), edit.columns.to(output.dtype))
    if edit.untouched is not None:
        edited = torch.where(edit.untouched, _blocks(flat, x.shape[0], rows), _blocks(edited, x.shape[0], rows))
    return edited.reshape(output.shape)


def _gated_in_float32(selected: torch.Tensor, edit: GeneralEdit) -> torch.Tensor:
    """[`_gated`], out of the reach of autocast: float16 cannot hold what is divided by small slopes."""
    device = selected.device.type
    if not torch.is_autocast_enabled(device):
        return _gated(selected, edit)
    with torch.autocast(device, enabled=False):
        return _gated(selected, edit)


def _gated(selected: torch.Tensor, edit: GeneralEdit) -> torch.Tensor:
    """What multiplies the columns: how much of each value a token needs, or of each neuron where there are gains."""
    assert edit.probe is not None
    assert edit.target is not None
    needed = torch.baddbmm(edit.target, selected, edit.probe.expand(len(selected), -1, -1))
    if edit.spread is None:
        return needed.clamp(edit.lowest, edit.highest)
    missing, slope = needed.chunk(2, dim=-1)
    amounts = (missing / slope.clamp(min=_LEAST)).clamp(edit.lowest, edit.highest)
    shift, gain = (amounts @ edit.spread).chunk(2, dim=-1)
    return torch.addcmul(shift, gain, selected)


def _blocks(tensor: torch.Tensor, batch: int, rows: int) -> torch.Tensor:
    """`[batch, ..., features]` or `[batch * ..., features]` -> `[rows, ..., features]`, 3-dimensional."""
    check_multiple(batch, rows)
    return tensor.reshape(rows, -1, tensor.shape[-1])


def check_multiple(batch: int, rows: int) -> None:
    """Refuses a batch that cannot be divided among rows of strengths."""
    if batch % rows != 0:
        raise NeVAError(
            f"Strengths were given for {rows} rows, but the model was run on a batch of {batch}, which is no multiple "
            "of that. Pass one dict of strengths per row of the inputs, or one dict for all."
        )
