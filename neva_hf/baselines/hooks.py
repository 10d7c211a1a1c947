"""Forward hooks that change what modules read or write, row by row of a batch, and that are gone afterwards.

Invariants: nothing is kept on the model or in a global; hooks are removed when the context ends, also by an exception; no
edit, no hook; a row whose strengths are all 0 gets zeros added or ones multiplied, so it keeps its numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from neva_hf.architectures import decoder_blocks
from neva_hf.dial import dialled, neva_layers
from neva_hf.edit import check_multiple
from neva_hf.strengths import parse_strengths

from .method import At, Dials


@dataclass
class Call:
    """What the decoder was last called with, as far as edits must know it.

    Args:
        rows (`int`): The rows of the batch; 0 before the first call.
        begins (`bool`): Whether nothing is cached yet, so that this is the prompt.
        last (`torch.Tensor`, *optional*): Int64 `[rows]`, the position of each row's last token that is not padding;
            `None` where that is the last one of all rows.
        origin (`torch.Tensor`, *optional*): Int64 `[rows]`, when something is cached: which row of the prompt's call each
            row goes on from; `None` where that cannot be told.
    """

    rows: int = 0
    begins: bool = True
    last: torch.Tensor | None = None
    origin: torch.Tensor | None = None


Change = Callable[[torch.Tensor, Call], torch.Tensor]
"""`[rows, tokens, features]` -> what takes its place."""


@dataclass(frozen=True)
class Edit:
    """A change of what one module reads or writes.

    Args:
        module (`str`): Its full name in the model.
        change (`Callable`): See `Change`.
        at_input (`bool`): Whether its first input is changed, instead of its (first) output.
    """

    module: str
    change: Change
    at_input: bool = False


@contextmanager
def edited(model: nn.Module, edits: Sequence[Edit]) -> Iterator[None]:
    """Puts edits in force while the context lasts.

    Args:
        model (`nn.Module`): A causal language model.
        edits (`Sequence[Edit]`): What to change; with none the model is left alone.
    """
    handles: list[RemovableHandle] = []
    call = Call()
    try:
        if edits:
            handles += _watch(model, call)
        for edit in edits:
            handles.append(_install(model.get_submodule(edit.module), edit, call))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(model: nn.Module, call: Call) -> list[RemovableHandle]:
    """Keeps a call up to date. The module that holds the blocks is asked, since wrappers call models past their hooks."""
    decoder = model.get_submodule(decoder_blocks(model)[0].rpartition(".")[0])
    tokens, prompt = 0, None

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal tokens
        given = [*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        inputs = next((one for one in given if isinstance(one, torch.Tensor)), None)
        if inputs is None:
            return
        past, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        call.rows, width = inputs.shape[:2]
        call.begins = past is None or past.get_seq_length() == 0
        call.last = call.origin = None
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            own = mask[:, -width:].long()
            call.last = (own * torch.arange(1, width + 1, device=own.device)).argmax(1)
        if call.begins:
            tokens = width
        else:
            call.origin = _origin(_key(past, tokens), prompt)

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        nonlocal prompt
        if call.begins:
            # (not the cache that was given: where there was none, the decoder made one)
            prompt = _key(getattr(output, "past_key_values", None), tokens)

    return [
        decoder.register_forward_pre_hook(before, with_kwargs=True),
        decoder.register_forward_hook(after),
    ]


def _key(cache: Any, tokens: int) -> torch.Tensor | None:
    """The last layer's key of a prompt's last token, `[rows, features]`; it tells rows of a cache apart.

    Caches are repeated, reordered and copied between calls, so a row's number does not tell which prompt it belongs to.
    """
    keys = getattr(cache.layers[-1], "keys", None) if getattr(cache, "layers", None) else None
    if not isinstance(keys, torch.Tensor) or keys.dim() != 4 or not 0 < tokens <= keys.shape[2]:
        return None
    return keys[:, :, tokens - 1].flatten(1).clone()


def _origin(keys: torch.Tensor | None, prompt: torch.Tensor | None) -> torch.Tensor | None:
    if keys is None or prompt is None or keys.shape[1] != prompt.shape[1]:
        return None
    same = (keys[:, None] == prompt).all(-1)
    return same.long().argmax(1) if bool(same.any(1).all()) else None


def _install(module: nn.Module, edit: Edit, call: Call) -> RemovableHandle:
    def changed(x: torch.Tensor) -> torch.Tensor:
        # Some models flatten rows and tokens.
        rows = x.reshape(call.rows or x.shape[0], -1, x.shape[-1])
        return edit.change(rows, call).reshape(x.shape)

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (changed(args[0]), *args[1:])

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        return (changed(output[0]), *output[1:]) if isinstance(output, tuple) else changed(output)

    return module.register_forward_pre_hook(before) if edit.at_input else module.register_forward_hook(after)


def per_row(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One line per row of dials, laid out for the rows of a batch, beams and returned sequences included.

    Args:
        table (`torch.Tensor`): `[rows of dials or 1, features]`.
        x (`torch.Tensor`): `[rows, tokens, features]`.

    Returns:
        `torch.Tensor`: `[rows or 1, 1, features]`, in the dtype and on the device of `x`.

    Raises:
        `NeVAError`: If the batch is no multiple of the rows of dials.
    """
    check_multiple(x.shape[0], table.shape[0])
    if table.shape[0] not in (1, x.shape[0]):
        table = table.repeat_interleave(x.shape[0] // table.shape[0], dim=0)
    return table[:, None].to(x)


def strength_table(rows: Sequence[Dials], values: Sequence[str]) -> torch.Tensor:
    """Checked strengths, `[rows or 1, values]`, float32 on the CPU. See [`parse_strengths`]."""
    return parse_strengths(list(rows), values)


def steering(model: nn.Module, values: Sequence[str], make: Callable[[torch.Tensor], Sequence[Edit]]) -> At:
    """What puts dials in force by edits.

    Args:
        model (`nn.Module`): The model.
        values (`Sequence[str]`): The values, in the order of the columns that `make` gets.
        make (`Callable`): From strengths, `[rows or 1, values]`, to edits; not asked when all are 0.

    Returns:
        `At`: For a [`Method`].
    """

    @contextmanager
    def at(rows: Sequence[Dials]) -> Iterator[None]:
        table = strength_table(rows, values)
        with edited(model, make(table) if bool(table.any()) else []):
            yield

    return at


def adding(
    model: nn.Module,
    values: Sequence[str],
    vectors: Mapping[str, torch.Tensor],
    *,
    gains: Mapping[str, torch.Tensor] | None = None,
    at_input: bool = False,
) -> At:
    """Dials that add vectors at all positions: strength times vector, summed over values.

    Args:
        model (`nn.Module`): The model.
        values (`Sequence[str]`): The values.
        vectors (`Mapping[str, torch.Tensor]`): Module -> float32 `[values, features]`.
        gains (`Mapping[str, torch.Tensor]`, *optional*): For the same modules, which multiples of what is there are added
            besides, float32 `[values, features]`.
        at_input (`bool`): Whether they are added to what modules read, instead of what they write.

    Returns:
        `At`: For a [`Method`].
    """

    def added(total: torch.Tensor) -> Change:
        return lambda x, _: x + per_row(total, x)

    def gained(total: torch.Tensor, gain: torch.Tensor) -> Change:
        return lambda x, _: x + per_row(total, x) + per_row(gain, x) * x

    def make(table: torch.Tensor) -> list[Edit]:
        edits = []
        for name, vector in vectors.items():
            total, gain = table @ vector, None if gains is None else table @ gains[name]
            if gain is not None and bool(gain.any()):
                edits.append(Edit(name, gained(total, gain), at_input))
            elif bool(total.any()):
                edits.append(Edit(name, added(total), at_input))
        return edits

    return steering(model, values, make)


def neutral(model: nn.Module) -> AbstractContextManager[None]:
    """Puts NeVA layers of a model to strength 0 for a while, where it has any that are active."""
    layers = neva_layers(model)
    active = any(name in layer.neva_configs for layer in layers for name in layer.active_adapters)
    return dialled(model, {}) if active else nullcontext()
