"""One pass over scenarios: every neuron's activation in each reply, and what shifting it would do to that reply.

A reply's gradient comes from a probe: a vector of zeros per reply, added to a layer's activations at all the reply's
tokens. The derivative of the reply's log-probability with respect to it is that of a constant shift, summed over the
tokens by autograd, so there is nothing per token to keep. (On request, a second one multiplies the activations and is
added: its derivative is that of a gain.) All replies of a scenario go through together after their
prompt was run once (in two groups, where lengths differ much); a backward pass serves every value. On request, sums for
linear value probes are kept as well (of what the down projections write; see probe.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from neva_hf.architectures import find_down_projections
from neva_hf.errors import NeVAError
from neva_hf.layer import layer_sizes
from neva_hf.measure import EncodedScenario, Progress, contrast, encode, grouped_log_probs, no_progress
from neva_hf.scenarios import Scenario

from .checkpoint import checkpoint_key, read_checkpoint, write_checkpoint
from .lengths import length_groups, only, worth_of_a_pass
from .parallel import add_up, processes, share
from .statistics import Statistics


def _lists() -> defaultdict[int, list[torch.Tensor]]:
    return defaultdict(list)


@dataclass
class _Taps:
    """What the hooks share with the loop while one scenario runs: by layers, one tensor per group of replies."""

    mask: torch.Tensor | None = None
    probes: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    means: dict[int, list[torch.Tensor]] = field(default_factory=_lists)
    active: dict[int, list[torch.Tensor]] = field(default_factory=_lists)
    sums: dict[int, list[torch.Tensor]] = field(default_factory=_lists)
    squares: dict[int, list[torch.Tensor]] = field(default_factory=_lists)
    written: dict[int, list[torch.Tensor]] = field(default_factory=_lists)

    def forget(self) -> None:
        """Lets go of what the last scenario left."""
        self.mask = None
        for kept in (self.probes, self.means, self.active, self.sums, self.squares, self.written):
            kept.clear()


@contextmanager
def _tapped(modules: Sequence[nn.Module], outputs: bool, gains: bool) -> Iterator[_Taps]:
    taps = _Taps()

    def hook(layer: int, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if taps.mask is None or not torch.is_grad_enabled():
            return None
        (x,) = inputs
        replies, tokens = taps.mask.shape
        # Some models flatten batch and tokens.
        rows = x.reshape(replies, tokens, -1)
        mask = taps.mask[:, :, None].to(x.device)
        # (in float32: sums of half-precision numbers lose digits)
        own = rows.detach().float() * mask
        taps.means[layer].append(own.sum(1) / mask.sum(1))
        taps.active[layer].append((own > 0).sum(1) / mask.sum(1))
        taps.sums[layer].append(own.sum((0, 1)).double())
        taps.squares[layer].append(own.square().sum((0, 1)).double())
        probed, taps.probes[layer] = with_probes(rows, gains)
        return (probed.reshape(x.shape),)

    def output_hook(layer: int, output: torch.Tensor) -> None:
        if taps.mask is None or not torch.is_grad_enabled():
            return
        mask = taps.mask[:, :, None].to(output.device)
        own = output.detach().reshape(*taps.mask.shape, -1).float() * mask
        taps.written[layer].append(own.sum(1) / mask.sum(1))

    handles = [
        module.register_forward_pre_hook(lambda _, inputs, layer=layer: hook(layer, inputs))
        for layer, module in enumerate(modules)
    ]
    if outputs:
        handles += [
            module.register_forward_hook(lambda _, __, output, layer=layer: output_hook(layer, output))
            for layer, module in enumerate(modules)
        ]
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()


def with_probes(rows: torch.Tensor, gains: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Activations that can be differentiated by what is done to neurons, at all tokens of a row alike.

    Args:
        rows (`torch.Tensor`): `[rows, tokens, N]`.
        gains (`bool`): Whether by gains too.

    Returns:
        `tuple[torch.Tensor, list[torch.Tensor]]`: The same numbers, and zeros `[rows, 1, N]` in float32: those that are
            added to them, and with `gains` those that multiply them and are added.
    """
    probes = [
        torch.zeros(rows.shape[0], 1, rows.shape[2], device=rows.device, dtype=torch.float32, requires_grad=True)
        for _ in range(2 if gains else 1)
    ]
    probed = rows + probes[0].to(rows.dtype)
    return (torch.addcmul(probed, rows, probes[1].to(rows.dtype)) if gains else probed), probes


def collect(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    scenarios: Sequence[Scenario],
    values: Sequence[str],
    *,
    probes: bool = False,
    gains: bool = False,
    checkpoint: Path | None = None,
    checkpoint_every: int = 10,
    progress: Progress[Scenario] = no_progress,
) -> Statistics:
    """Runs the pass.

    Args:
        model (`nn.Module`): The base model, a causal language model of transformers without adapters.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        scenarios (`Sequence[Scenario]`): The scenarios.
        values (`Sequence[str]`): The values to keep sums for. Replies of other values take part as those that they are
            held against.
        probes (`bool`): Whether to keep what value probes need (`written` and `scatter` of [`Statistics`], which says how
            much memory they take; each checkpoint takes as much of the disk).
        gains (`bool`): Whether to keep what gains need (`gain_gradient` of [`Statistics`]).
        checkpoint (`Path`, *optional*): A file to write the sums to as they grow, and to go on from if it is there.
        checkpoint_every (`int`): After how many scenarios.
        progress ([`Progress`]): Shows how far it is.

    Returns:
        [`Statistics`]: The sums.

    Raises:
        `NeVAError`: If no scenario contrasts one of the values, a reply is a single token, or the model's layers
            differ in size.
    """
    unheard = [value for value in values if not any(contrast(list(one.replies), value) for one in scenarios)]
    if unheard:
        raise NeVAError(
            f"No scenario contrasts {', '.join(unheard)} with another reply: their replies must stand in `replies` of "
            "some scenarios, beside others."
        )
    modules = find_down_projections(model)
    sizes = sorted({layer_sizes(module)[0] for module in modules.values()})
    hidden = layer_sizes(next(iter(modules.values())))[1]
    if len(sizes) > 1:
        raise NeVAError(
            f"The FFNs of this model have different sizes ({sizes}), which identification does not handle yet."
        )
    statistics = Statistics.zeros(list(values), list(modules), sizes[0], hidden if probes else None, gains)
    mine = share(scenarios)
    path, key, done = None, "", 0
    if checkpoint is not None:
        path = checkpoint.with_name(f"{checkpoint.name}.{processes()[0]}")
        key = checkpoint_key(str(getattr(model, "name_or_path", "")), scenarios, statistics)
        done = read_checkpoint(path, statistics.tensors(), key)
    with left_as_it_was(model), _tapped(list(modules.values()), probes, gains) as taps:
        model.requires_grad_(False).eval()
        for number, scenario in enumerate(progress(mine[done:], "scenarios"), start=done + 1):
            encoded = encode_replies(tokenizer, scenario)
            _add_scenario(model, encoded, taps, statistics)
            if path is not None and (number % checkpoint_every == 0 or number == len(mine)):
                write_checkpoint(path, statistics.tensors(), number, key)
    add_up(list(statistics.tensors().values()))
    return statistics


def encode_replies(tokenizer: PreTrainedTokenizerBase, scenario: Scenario) -> EncodedScenario:
    """A scenario as token ids, every reply of which has tokens that run through the model.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        scenario ([`Scenario`]): The scenario.

    Returns:
        [`EncodedScenario`]: From [`encode`].

    Raises:
        `NeVAError`: If a reply is a single token.
    """
    encoded = encode(tokenizer, scenario)
    if encoded.mask[:, :2].sum() < 2 * len(encoded.keys):
        raise NeVAError(
            f"A reply to {scenario.question!r:.80} is a single token: nothing of it runs through the model "
            "before it is said. Write replies of a sentence or two."
        )
    return encoded


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Puts back which parameters of a model are trained, and which of its modules are in training mode."""
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for parameter, wanted in trained.items():
            parameter.requires_grad_(wanted)
        for module, mode in modes.items():
            module.training = mode


def _add_scenario(model: nn.Module, encoded: EncodedScenario, taps: _Taps, statistics: Statistics) -> None:
    weights = [contrast(encoded.keys, value) for value in statistics.values]
    rows = [number for number, row in enumerate(weights) if row is not None]
    if not rows:
        return
    device = next(model.parameters()).device
    layers = range(len(statistics.modules))
    groups = length_groups(encoded, worth_of_a_pass(device))
    parts = [only(encoded, group) for group in groups]
    gradients: list[list[tuple[torch.Tensor, ...]]] = []
    with torch.enable_grad():
        log_probs = grouped_log_probs(model, parts)
        for part in parts:
            # The last token of a reply is told by the one before it and runs through nothing itself.
            taps.mask = part.mask[:, 1:].to(device)
            total = next(log_probs).sum()
            found = iter(torch.autograd.grad(total, [one for layer in layers for one in taps.probes[layer]]))
            gradients.append([tuple(next(found) for _ in taps.probes[layer]) for layer in layers])
    # Back into the order of the replies.
    back = torch.tensor([number for group in groups for number in group]).argsort()

    def of_replies(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(tensors).double().cpu()[back]

    table = torch.tensor([weights[number] for number in rows], dtype=torch.float64)
    for layer in layers:
        means = of_replies(taps.means[layer])
        for kind, sums in enumerate((statistics.gradient, statistics.gain_gradient)):
            if sums is not None:
                sums[rows, layer] += table @ of_replies([one[layer][kind][:, 0] for one in gradients])
        statistics.difference[rows, layer] += table @ means
        statistics.activity[rows, layer] += table @ of_replies(taps.active[layer])
        statistics.spread[layer] += means.var(0)
        statistics.mean[layer] += torch.stack(taps.sums[layer]).sum(0).cpu()
        statistics.square[layer] += torch.stack(taps.squares[layer]).sum(0).cpu()
        if statistics.written is not None and statistics.scatter is not None:
            written = of_replies(taps.written[layer])
            statistics.written[rows, layer] += table @ written
            own = (written - written.mean(0)).float()
            statistics.scatter[layer].addmm_(own.T, own, alpha=1 / (len(own) - 1))
    statistics.count[rows] += 1
    opposed = torch.tensor([f"-{statistics.values[number]}" in encoded.keys for number in rows])
    statistics.rivals[rows] += torch.where(opposed, 0, (table < 0).sum(1)).double()
    statistics.scenarios += 1
    statistics.tokens += float(encoded.mask[:, 1:].sum())
    taps.forget()
