"""Linear value probes, one per value and layer, and what each neuron adds to their logits.

A probe reads what a down projection writes, in the mean over a reply's tokens, and tells a value's reply from the replies
that compete with it. What is written is linear in the neurons, so the part of neuron n in the logit is exactly
`(w . column_n) * x_n` in every architecture, also where a norm follows the FFN or where the block is parallel to the
attention; of a probe of the residual stream that would hold only up to such norms.

With m the mean contrast of what is written and S the covariance of it between replies to the same question, the probe is

    w = (S + lambda I)^-1 m,   lambda = shrinkage * mean(diag(S))

which is the linear discriminant with shrinkage towards a round covariance (Friedman 1989, "Regularized Discriminant
Analysis"), and at the same time the ridge regression from what is written to the contrast, both within questions: Fisher's
discriminant and least squares are one direction. S and m are sums, so nothing is kept per scenario.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from neva_hf.architectures import find_down_projections
from neva_hf.errors import NeVAError
from neva_hf.projection import columns

from .statistics import Statistics

# In parts of the mean variance. (SmolLM2-135M-Instruct, probes of 15 scenarios on 6 others: in 97.5% of the pairs the
# value's reply is above the competing one, mean over the middle layers; in 96.8% with 0.1, in 97.8% with 10.)
SHRINKAGE = 1.0
# Columns at a time: float32 copies of all of them would be as large as a layer.
_CHUNK = 2048


def value_probes(statistics: Statistics, shrinkage: float = SHRINKAGE) -> torch.Tensor:
    """The weights of the value probes, in closed form.

    The logit is `w . (y - midway)`, y being what the down projection writes and midway the middle between the value's
    replies and the competing ones; only its slope w matters to how much a neuron adds.

    Args:
        statistics ([`Statistics`]): Sums of a pass with `probes=True`.
        shrinkage (`float`): What is added to every variance, in parts of the mean variance of the layer; above 0.

    Returns:
        `torch.Tensor`: Float32 `[V, L, H]`, logits per unit of what is written.

    Raises:
        `NeVAError`: If the statistics hold no sums for probes, or the shrinkage is not above 0.
    """
    if statistics.written is None or statistics.scatter is None:
        raise NeVAError("These statistics hold no sums for value probes: collect them with probes=True.")
    if not shrinkage > 0:
        raise NeVAError(f"`shrinkage` must be above 0, got {shrinkage!r}.")
    means = statistics.written / statistics.count.clamp(min=1)[:, None, None]
    found = torch.zeros(means.shape)
    for layer, scatter in enumerate(statistics.scatter):
        covariance = scatter.double() / statistics.scenarios.clamp(min=1)
        # (a layer that writes the same whatever is said has no variance, and no contrast either)
        ridge = max(shrinkage * float(covariance.diagonal().mean()), 1e-30)
        covariance.diagonal().add_(ridge)
        found[:, layer] = torch.linalg.solve(covariance, means[:, layer].T).T.float()
    return found


def with_logits_per_unit(model: nn.Module, statistics: Statistics, shrinkage: float = SHRINKAGE) -> Statistics:
    """The same statistics with what a unit of each neuron adds to the logits of the value probes.

    Columns are read as edits read them ([`columns`]): from plain weights, and by running layers of any other kind.

    Args:
        model (`nn.Module`): The model of the pass, without adapters.
        statistics ([`Statistics`]): Sums of a pass with `probes=True`.
        shrinkage (`float`): See [`value_probes`].

    Returns:
        [`Statistics`]: With `logit_per_unit`, float32 `[V, L, N]` on the CPU; it shares its sums with the given ones.

    Raises:
        `NeVAError`: If the statistics hold no sums for probes, or are of another model.
    """
    probes = value_probes(statistics, shrinkage)
    modules = find_down_projections(model)
    if list(modules) != statistics.modules:
        raise NeVAError("These statistics are of another model: its down projections have other names.")
    found = torch.zeros(statistics.difference.shape)
    for layer, module in enumerate(modules.values()):
        for index in torch.arange(found.shape[2]).split(_CHUNK):
            written = columns(module, index)
            found[:, layer, index] = (probes[:, layer].to(written.device) @ written.T).cpu()
    return replace(statistics, logit_per_unit=found)
