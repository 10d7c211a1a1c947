"""How much shifting each neuron disturbs a model on neutral text: samples that stand for its Fisher matrix.

For a small shift d of the neurons, the mean KL divergence from the base model is `d.F.d / 2` nats per token, F being the
Fisher matrix of the next-token distributions with respect to d. F has as many rows as neurons, so it is kept as samples:
with one token y drawn per position from the model's own distribution and random signs e, the gradient of
`sum over positions of e * log p(y)`, divided by the root of the number of positions, has the covariance F. (A standard
estimate of the Fisher matrix, Martens 2020, arXiv 1412.1193, section 5; the random signs are ours.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from neva_hf.architectures import find_down_projections
from neva_hf.errors import NeVAError
from neva_hf.measure import Progress, no_progress

from .collect import left_as_it_was
from .parallel import add_up, share


def fisher_samples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    samples: int = 192,
    max_tokens: int = 130,
    seed: int = 0,
    progress: Progress[Any] = no_progress,
) -> torch.Tensor:
    """Samples whose covariance is the Fisher matrix of a model with respect to shifts of its FFN neurons.

    Args:
        model (`nn.Module`): A causal language model of transformers, without adapters.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        texts (`Sequence[str]`): Neutral texts.
        samples (`int`): How many; two are drawn from each forward pass.
        max_tokens (`int`): Of each text, at most so many tokens from the front.
        seed (`int`): For the drawn tokens and signs.
        progress ([`Progress`]): Shows how far it is.

    Returns:
        `torch.Tensor`: Float32 `[samples, L, N]` on the CPU: its size is all that this keeps.

    Raises:
        `NeVAError`: If there is no text with at least two tokens.
    """
    modules = list(find_down_projections(model).values())
    probes: dict[int, torch.Tensor] = {}

    def hook(layer: int, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        (x,) = inputs
        probe = torch.zeros(x.shape[-1], device=x.device, dtype=torch.float32, requires_grad=True)
        probes[layer] = probe
        return (x + probe.to(x.dtype),)

    device = next(model.parameters()).device
    encoded = [torch.tensor([tokenizer(text)["input_ids"][:max_tokens]], device=device) for text in texts]
    encoded = [ids for ids in encoded if ids.shape[1] > 1]
    if not encoded:
        raise NeVAError("The neutral texts hold fewer than two tokens.")
    found: torch.Tensor | None = None
    passes = list(range((samples + 1) // 2))
    handles = [
        module.register_forward_pre_hook(lambda _, inputs, layer=layer: hook(layer, inputs))
        for layer, module in enumerate(modules)
    ]
    try:
        with left_as_it_was(model):
            model.requires_grad_(False).eval()
            for number in progress(share(passes), "sensitivity"):
                # Each pass draws by itself, so that it does not matter which process makes it.
                generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
                ids = encoded[number % len(encoded)]
                with torch.enable_grad():
                    log_probs = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
                    uniform = torch.rand(log_probs.shape[0], 1, generator=generator).to(device)
                    # Inverse sampling: the first token at which the cumulated probability exceeds the draw.
                    cumulated = log_probs.detach().exp().cumsum(-1)
                    drawn = (cumulated < uniform * cumulated[:, -1:]).sum(-1, keepdim=True)
                    told = log_probs.gather(1, drawn.clamp(max=log_probs.shape[1] - 1))[:, 0]
                    for half in (0, 1):
                        signs = torch.randint(0, 2, (len(told),), generator=generator).to(device) * 2 - 1
                        gradients = torch.autograd.grad(
                            (told * signs).sum(),
                            [probes[layer] for layer in range(len(modules))],
                            retain_graph=half == 0,
                        )
                        rows = torch.stack([one.float().cpu() for one in gradients]) / len(told) ** 0.5
                        if found is None:
                            found = torch.zeros(2 * len(passes), *rows.shape)
                        found[2 * number + half] = rows
    finally:
        for handle in handles:
            handle.remove()
    assert found is not None
    add_up([found])
    return found[:samples]
