"""Samples whose covariance is a Fisher matrix: what both neutral text and replies need to draw them.

With z a standard normal number for each position and token of the vocabulary, the gradient of
`sum over positions and tokens y of z_y * sqrt(p(y)) * log p(y)`, divided by the root of the number of positions, has the
covariance F. (The Fisher matrix is the expectation of outer products of `grad log p(y)`, Martens 2020, arXiv 1412.1193,
section 5. To weigh all tokens at once rather than to draw one, as usual, is ours: drawn tokens give heavy tails.)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neva_hf.architectures import find_down_projections
from neva_hf.measure import Progress

from .checkpoint import read_checkpoint, write_checkpoint
from .collect import left_as_it_was, with_probes
from .parallel import add_up, processes, share


def sampled(
    model: nn.Module,
    passes: int,
    shape: tuple[int, ...],
    draw: Callable[[int, Probes], torch.Tensor],
    *,
    gains: bool,
    checkpoint: Path | None,
    checkpoint_every: int,
    key: list[Any],
    progress: Progress[int],
) -> torch.Tensor:
    """Runs passes that draw samples. Processes share them, and a run that was killed goes on.

    Args:
        model (`nn.Module`): A causal language model of transformers, without adapters. It is left as it was.
        passes (`int`): How many.
        shape (`tuple[int, ...]`): Of what each pass finds.
        draw (callable): Makes it of the number of the pass, and of [`Probes`] in the model; gradients are on.
        gains (`bool`): Whether the probes are of gains, too.
        checkpoint (`Path`, *optional*): A file to write what is found to, and to go on from.
        checkpoint_every (`int`): After how many passes.
        key (`list[Any]`): What a checkpoint must agree in, beside the model and the shape.
        progress ([`Progress`]): Shows how far it is.

    Returns:
        `torch.Tensor`: Float32 `[passes, *shape]` on the CPU.
    """
    found = torch.zeros(passes, *shape)
    mine, path, agreed, done = share(list(range(passes))), None, "", 0
    if checkpoint is not None:
        path = checkpoint.with_name(f"{checkpoint.name}.{processes()[0]}")
        agreed = json.dumps([*key, list(shape), str(getattr(model, "name_or_path", "")), *processes()])
        done = read_checkpoint(path, {"samples": found}, agreed)
    with left_as_it_was(model), _probed(list(find_down_projections(model).values()), gains) as probes:
        model.requires_grad_(False).eval()
        for count, number in enumerate(progress(mine[done:], "samples"), start=done + 1):
            # Each pass draws by itself, so that it does not matter which process makes it, or after what.
            with torch.enable_grad():
                found[number] = draw(number, probes)
            if path is not None and (count % checkpoint_every == 0 or count == len(mine)):
                write_checkpoint(path, {"samples": found}, count, agreed)
    add_up([found])
    return found


@dataclass
class Probes:
    """Zeros to differentiate by in each layer, from [`with_probes`].

    Args:
        rows (`int`): How many rows the next forward pass has. (Some models flatten batch and tokens.)
        vectors (`dict[int, list[torch.Tensor]]`): By layers, those of the latest forward pass with gradients.
    """

    rows: int = 1
    vectors: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    def gradients(self, told: torch.Tensor, weights: torch.Tensor, keep: bool) -> torch.Tensor:
        """The derivatives of `(weights * told).sum()` by what is done to each row: `[rows, parts, L, N]` on the CPU."""
        layers, parts = len(self.vectors), len(self.vectors[0])
        vectors = [vector for layer in range(layers) for vector in self.vectors[layer]]
        found = torch.autograd.grad(told, vectors, grad_outputs=weights, retain_graph=keep)
        return torch.stack([one[:, 0].cpu() for one in found], dim=1).unflatten(1, (layers, parts)).transpose(1, 2)


@contextmanager
def _probed(modules: Sequence[nn.Module], gains: bool) -> Iterator[Probes]:
    probes = Probes()

    def hook(layer: int, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        # (prompts run without gradients)
        if not torch.is_grad_enabled():
            return None
        (x,) = inputs
        blocks = x.reshape(probes.rows, -1, x.shape[-1])
        probed, probes.vectors[layer] = with_probes(blocks, gains)
        return (probed.reshape(x.shape),)

    handles = [
        module.register_forward_pre_hook(lambda _, inputs, layer=layer: hook(layer, inputs))
        for layer, module in enumerate(modules)
    ]
    try:
        yield probes
    finally:
        for handle in handles:
            handle.remove()


def drawn_samples(logits: torch.Tensor, mask: torch.Tensor, probes: Probes, draws: int, seed: int) -> torch.Tensor:
    """Draws samples of the Fisher matrix of each row; the formula is at the top of the file.

    Args:
        logits (`torch.Tensor`): `[rows, tokens, vocabulary]`, of a forward pass with gradients.
        mask (`torch.Tensor`): Float32 `[rows, tokens]`, 1 at the positions that count.
        probes ([`Probes`]): Those of that pass.
        draws (`int`): How many samples of each row.
        seed (`int`): For the random numbers, drawn on the device of the logits.

    Returns:
        `torch.Tensor`: Float32 `[draws, rows, parts, L, N]` on the CPU, per position.
    """
    log_probs = logits.float().log_softmax(-1)
    root = (log_probs.detach() / 2).exp() * mask[:, :, None].to(logits.device)
    # (where they are needed: a number for each token of the vocabulary takes long to move)
    generator = torch.Generator(log_probs.device).manual_seed(seed)
    found = []
    for draw in range(draws):
        normal = torch.randn(log_probs.shape, generator=generator, device=log_probs.device)
        found.append(probes.gradients(log_probs, normal * root, keep=draw + 1 < draws))
    return torch.stack(found) / mask.sum(1).sqrt()[:, None, None, None]
