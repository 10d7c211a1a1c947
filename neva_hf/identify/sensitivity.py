"""How much shifting each neuron disturbs a model on neutral text: samples that stand for its Fisher matrix.

For a small shift d of the neurons, the mean KL divergence from the base model is `d.F.d / 2` nats per token, F being the
Fisher matrix of the next-token distributions with respect to d. F has as many rows as neurons, so it is kept as samples:
with z a standard normal number for each position and token of the vocabulary, the gradient of
`sum over positions and tokens y of z_y * sqrt(p(y)) * log p(y)`, divided by the root of the number of positions, has the
covariance F. (The Fisher matrix is the expectation of outer products of `grad log p(y)`, Martens 2020, arXiv 1412.1193,
section 5. To weigh all tokens at once rather than to draw one, as usual, is ours: drawn tokens give heavy tails.)

How good a shift is depends on how many samples there are and on how much text they come from, hardly on how many tokens
each is taken from: with few of them, neurons look harmless that are not. So texts are cut into short windows, each of
which gives samples of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from neva_hf.architectures import find_down_projections
from neva_hf.errors import NeVAError
from neva_hf.layer import layer_sizes
from neva_hf.measure import Progress, no_progress

from .checkpoint import read_checkpoint, write_checkpoint
from .collect import left_as_it_was
from .parallel import add_up, processes, share

_DRAWS = 2  # from each forward pass, which costs as much as a backward pass


def fisher_samples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    samples: int = 2048,
    window: int = 32,
    rows: int = 8,
    seed: int = 0,
    checkpoint: Path | None = None,
    checkpoint_every: int = 32,
    progress: Progress[Any] = no_progress,
) -> torch.Tensor:
    """Samples whose covariance is the Fisher matrix of a model with respect to shifts of its FFN neurons.

    Args:
        model (`nn.Module`): A causal language model of transformers, without adapters.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        texts (`Sequence[str]`): Neutral texts.
        samples (`int`): How many.
        window (`int`): From how many tokens each is taken.
        rows (`int`): How many windows run at once.
        seed (`int`): For the order of the windows, and the random numbers, which are drawn on the model's device: those
            of a CPU are the same everywhere, those of a GPU are others.
        checkpoint (`Path`, *optional*): A file to write the samples to as they are found, and to go on from.
        checkpoint_every (`int`): After how many passes.
        progress ([`Progress`]): Shows how far it is.

    Returns:
        `torch.Tensor`: Float32 `[samples, L, N]` on the CPU: its size is all that this keeps.

    Raises:
        `NeVAError`: If there is no text with at least two tokens.
    """
    modules = list(find_down_projections(model).values())
    windows = _windows(tokenizer, texts, window)
    # (another seed than that of the first pass, or the order and what it draws would be one stream of numbers)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed + 7))
    per_pass = _DRAWS * rows
    passes = list(range(-(-samples // per_pass)))
    found = torch.zeros(len(passes) * per_pass, len(modules), layer_sizes(modules[0])[0])
    mine, path, key, done = share(passes), None, "", 0
    if checkpoint is not None:
        path = checkpoint.with_name(f"{checkpoint.name}.{processes()[0]}")
        key = _key(model, windows, [samples, window, rows, seed, *processes()])
        done = read_checkpoint(path, {"samples": found}, key)
    with left_as_it_was(model), _probed(modules) as probes:
        model.requires_grad_(False).eval()
        for count, number in enumerate(progress(mine[done:], "sensitivity"), start=done + 1):
            # Each pass draws by itself, so that it does not matter which process makes it, or after what.
            drawn = seed * 1_000_003 + number
            picked = order[torch.arange(number * rows, (number + 1) * rows) % len(order)]
            found[number * per_pass : (number + 1) * per_pass] = _draw(model, windows[picked], probes, drawn)
            if path is not None and (count % checkpoint_every == 0 or count == len(mine)):
                write_checkpoint(path, {"samples": found}, count, key)
    add_up([found])
    return found[:samples]


def _windows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], window: int) -> torch.Tensor:
    """Texts cut into pieces of one length, with the token in front that the model expects: int64 `[pieces, tokens]`."""
    front = [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id][:1]
    bodies = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    width = min(window - len(front), max(map(len, bodies), default=0))
    if width < 2:
        raise NeVAError("The neutral texts hold fewer than two tokens.")
    pieces = [
        front + body[start : start + width] for body in bodies for start in range(0, len(body) - width + 1, width)
    ]
    return torch.tensor(pieces)


@dataclass
class _Probes:
    """Zeros that are added to the inputs of each layer, one vector per row of the batch, to differentiate by."""

    rows: int = 1
    vectors: dict[int, torch.Tensor] = field(default_factory=dict)


@contextmanager
def _probed(modules: Sequence[nn.Module]) -> Iterator[_Probes]:
    probes = _Probes()

    def hook(layer: int, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        (x,) = inputs
        # (some models flatten batch and tokens)
        blocks = x.reshape(probes.rows, -1, x.shape[-1])
        vector = torch.zeros(probes.rows, 1, x.shape[-1], device=x.device, requires_grad=True)
        probes.vectors[layer] = vector
        return ((blocks + vector.to(x.dtype)).reshape(x.shape),)

    handles = [
        module.register_forward_pre_hook(lambda _, inputs, layer=layer: hook(layer, inputs))
        for layer, module in enumerate(modules)
    ]
    try:
        yield probes
    finally:
        for handle in handles:
            handle.remove()


def _draw(model: nn.Module, ids: torch.Tensor, probes: _Probes, seed: int) -> torch.Tensor:
    """`_DRAWS` samples of each window: `[draws * rows, L, N]`."""
    device = next(model.parameters()).device
    probes.rows = len(ids)
    with torch.enable_grad():
        log_probs = model(input_ids=ids.to(device), use_cache=False).logits.float().log_softmax(-1)
        # (where they are needed: a number for each token of the vocabulary takes long to move)
        generator = torch.Generator(log_probs.device).manual_seed(seed)
        root = (log_probs.detach() / 2).exp()
        vectors = [probes.vectors[layer] for layer in range(len(probes.vectors))]
        samples = []
        for draw in range(_DRAWS):
            normal = torch.randn(log_probs.shape, generator=generator, device=log_probs.device)
            gradients = torch.autograd.grad(
                log_probs, vectors, grad_outputs=normal * root, retain_graph=draw + 1 < _DRAWS
            )
            samples.append(torch.stack([one[:, 0].cpu() for one in gradients], dim=1) / ids.shape[1] ** 0.5)
    return torch.cat(samples)


def _key(model: nn.Module, windows: torch.Tensor, settings: list[int]) -> str:
    """What a checkpoint must agree in to be taken up."""
    words = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    return json.dumps(["sensitivity, all tokens", str(getattr(model, "name_or_path", "")), words, settings])
