"""ConVA against its formula, written once more by hand on a tiny model."""

from __future__ import annotations

import math
from contextlib import ExitStack

import pytest
import torch
from steered import MANY, evidence, ids, logits, rewritten
from tiny import HIDDEN, LAYERS, VALUES, tiny_reader, tiny_tokenizer
from transformers import PreTrainedModel

from neva_hf.architectures import decoder_blocks
from neva_hf.baselines.conva import StreamProbes, fit_probes, gated, used_layers
from neva_hf.measure import encode, reply_log_probs

POWER = VALUES.index("power")


def blocks_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    return list(decoder_blocks(model)[1])


def random_probes(seed: int = 0) -> StreamProbes:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(len(VALUES), LAYERS, HIDDEN, generator=generator)
    bias = torch.randn(len(VALUES), LAYERS, generator=generator)
    return StreamProbes(weight, bias, torch.ones(len(VALUES), LAYERS))


def shift_by_hand(
    probes: StreamProbes, layer: int, x: torch.Tensor, strength: float, probability: float
) -> torch.Tensor:
    """Of one prompt, `[tokens, H]`, for power."""
    w, b = probes.weight[POWER, layer], probes.bias[POWER, layer]
    v, wanted = w / w.norm(), math.log(probability / (1 - probability))
    if strength < 0:
        return -abs(strength) * max(0.0, float(wanted + (w @ x[-1] + b))) / float(w @ v) * v
    return strength * max(0.0, wanted - float(w @ x[-1] + b)) / float(w @ v) * v


@pytest.mark.parametrize("strength", [1.0, -1.0, 0.3])
def test_conva_adds_the_least_shift_that_brings_the_prompt_to_its_probability(strength: float) -> None:
    model, probes = tiny_reader(), random_probes()
    used = torch.zeros(len(VALUES), LAYERS, dtype=torch.bool)
    used[POWER] = True
    names = [f"model.layers.{layer}" for layer in range(LAYERS)]
    at = gated(model, VALUES, names, probes, used, 0.8)
    given = ids(1)
    reached: list[float] = []
    with ExitStack() as stack:
        for layer, block in enumerate(blocks_of(model)):

            def change(x: torch.Tensor, layer: int = layer) -> torch.Tensor:
                moved = x + shift_by_hand(probes, layer, x[0], strength, 0.8)
                logit = float(probes.weight[POWER, layer] @ moved[0, -1] + probes.bias[POWER, layer])
                reached.append(logit)
                return moved

            stack.enter_context(rewritten(block, change, at_input=False))
        wanted = logits(model, given)
    with torch.no_grad(), at([{"power": strength}]):
        found = model(input_ids=given, use_cache=False).logits
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
    if abs(strength) == 1:
        # (a shift, if any was needed, ends exactly at the probability)
        edge = math.log(0.8 / 0.2)
        assert all(strength * logit >= edge - 1e-3 for logit in reached)


def test_conva_leaves_a_prompt_alone_that_is_there_already() -> None:
    model, probes = tiny_reader(), random_probes()
    sure = StreamProbes(probes.weight, torch.full_like(probes.bias, 1e4), probes.accuracy)
    at = gated(model, VALUES, ["model.layers.0", "model.layers.1"], sure, torch.ones(3, LAYERS, dtype=torch.bool))
    with torch.no_grad(), at([{"power": 1.0}]):
        found = model(input_ids=ids(), use_cache=False).logits
    assert torch.equal(found, logits(model, ids()))


def test_conva_reads_each_prompts_own_last_token_whichever_side_the_padding_is_on() -> None:
    model, probes = tiny_reader(), random_probes()
    at = gated(model, VALUES, ["model.layers.0", "model.layers.1"], probes, torch.ones(3, LAYERS, dtype=torch.bool))
    given = ids(2)
    with torch.no_grad(), at([{"power": 1.0}]):
        alone = [model(input_ids=given[:1]).logits[0], model(input_ids=given[1:, :6]).logits[0]]
        for side in ("left", "right"):
            padded, mask = given.clone(), torch.ones_like(given)
            where, own = (slice(0, 3), slice(3, 9)) if side == "left" else (slice(6, 9), slice(0, 6))
            padded[1, own] = given[1, :6]
            padded[1, where], mask[1, where] = 0, 0
            position = (mask.cumsum(1) - 1).clamp(min=0)
            found = model(input_ids=padded, attention_mask=mask, position_ids=position).logits
            torch.testing.assert_close(found[0], alone[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(found[1, own], alone[1], atol=1e-4, rtol=1e-4)


def test_conva_keeps_the_prompts_shift_for_all_that_follows_from_its_cache() -> None:
    model, probes = tiny_reader(), random_probes()
    at = gated(model, VALUES, ["model.layers.0", "model.layers.1"], probes, torch.ones(3, LAYERS, dtype=torch.bool))
    given, more = ids(3, 5), ids(4, 3, seed=7)
    # Rows of the cache are repeated, left out and reordered, as beams and shared prompts do.
    order = torch.tensor([2, 0, 2, 1])
    with torch.no_grad(), at([{"power": 1.0}]):
        cache = model(input_ids=given, use_cache=True).past_key_values
        cache.batch_select_indices(order)
        together = model(input_ids=more, past_key_values=cache, use_cache=True).logits
        for row, origin in enumerate(order.tolist()):
            cache = model(input_ids=given[origin : origin + 1], use_cache=True).past_key_values
            alone = model(input_ids=more[row : row + 1], past_key_values=cache, use_cache=True).logits
            torch.testing.assert_close(together[row], alone[0], atol=1e-4, rtol=1e-4)


def test_conva_gives_a_scenarios_replies_the_shift_of_their_prompt() -> None:
    model, probes = tiny_reader(), random_probes()
    used = torch.tensor([[False, False], [True, False], [False, False]])
    at = gated(model, VALUES, ["model.layers.0", "model.layers.1"], probes, used)
    encoded = encode(tiny_tokenizer(), MANY[0])
    with torch.no_grad(), at([{"power": 1.0}]):
        found = reply_log_probs(model, encoded)
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        with rewritten(blocks_of(model)[0], lambda x: seen.append(x) or x, at_input=False):  # type: ignore[func-returns-value]
            model(input_ids=encoded.prompt)
        shift = shift_by_hand(probes, 0, seen[0][0], 1.0, 0.99)
        with rewritten(blocks_of(model)[0], lambda x: x + shift, at_input=False):
            wanted = reply_log_probs(model, encoded)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_convas_probes_minimize_the_penalized_logistic_loss() -> None:
    readings = evidence().readings
    probes = fit_probes(readings, layers=[1])
    rows = [row for pair in readings.pairs[POWER] for row in (pair.own, *pair.rivals)]
    kept = [at for at, pair in enumerate(readings.pairs[POWER]) for _ in (pair.own, *pair.rivals)]
    told = torch.tensor([float(row == pair.own) for pair in readings.pairs[POWER] for row in (pair.own, *pair.rivals)])
    train = torch.tensor([at % 5 != 4 for at in kept])
    states = readings.last[rows, 1]
    scale = states.square().mean().sqrt()
    x, y = (states / scale)[train].double(), told[train].double()
    balance = torch.where(y > 0, len(y) / (2 * y.sum()), len(y) / (2 * (1 - y).sum()))
    w = (probes.weight[POWER, 1] * scale).double().requires_grad_()
    b = probes.bias[POWER, 1].double().requires_grad_()
    signs = 2 * y - 1
    loss = 0.5 * w.square().sum() - (balance * torch.nn.functional.logsigmoid(signs * (x @ w + b))).sum()
    loss.backward()
    assert w.grad is not None
    assert b.grad is not None
    assert float(w.grad.abs().max()) < 5e-3
    assert float(b.grad.abs()) < 5e-3


def test_conva_uses_good_layers_without_the_last_five() -> None:
    accuracy = torch.tensor(
        [[0.95, 0.5, 0.91, 0.9, 0.99, 0.99, 0.99, 0.99], [0.6, 0.7, 0.5, 0.99, 1.0, 1.0, 1.0, 1.0]]
    )
    assert used_layers(accuracy).int().tolist() == [[1, 0, 1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0]]
