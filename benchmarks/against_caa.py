"""A neuron map beside CAA at equal damage: same contrast, same scenarios, same KL divergence, one run.

    python benchmarks/against_caa.py MAP --split test --layers 12 15 18

CAA (Panickssery et al. 2023, arXiv 2312.06681) adds a vector to the residual stream behind one layer, everywhere. Here
the vector of a value is the mean difference, over training scenarios, between the residual stream in its reply and in the
competing replies to the same question (mean over the reply's tokens): the contrast that neuron maps are found with. Both
methods are scaled to the same KL divergence from the base model on the same neutral texts. Written to
`benchmarks/results/against_caa.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from neva_hf import NeuronMap, load_base, load_scenarios
from neva_hf.architectures import decoder_blocks
from neva_hf.layer import NeVALayer
from neva_hf.measure import contrast, encode, margins, scenario_log_probs
from neva_hf.scenarios import load_neutral_texts

Vectors = dict[str, torch.Tensor]


@contextmanager
def added(places: Sequence[nn.Module], vectors: Sequence[torch.Tensor | None]) -> Iterator[None]:
    """Adds a vector, `[hidden]` or one per row `[rows, 1, hidden]`, to what each module returns."""

    def hook(vector: torch.Tensor, output: Any) -> Any:
        return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

    handles = [
        place.register_forward_hook(lambda _, __, output, vector=vector: hook(vector, output))
        for place, vector in zip(places, vectors, strict=True)
        if vector is not None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def residual_contrasts(model: Any, tokenizer: Any, values: Sequence[str], limit: int | None) -> torch.Tensor:
    """CAA vectors, `[V, L, hidden]`."""
    total: torch.Tensor | None = None
    scenarios = load_scenarios("schwartz", "train", limit=limit)
    for scenario in scenarios:
        encoded = encode(tokenizer, scenario)
        count, prompt = len(encoded.keys), encoded.prompt.shape[1]
        ids = torch.cat([encoded.prompt.expand(count, -1), encoded.replies], dim=1)
        mask = torch.cat([torch.ones(count, prompt), encoded.mask], dim=1).long()
        with torch.inference_mode():
            states = model(ids, attention_mask=mask, output_hidden_states=True, logits_to_keep=1).hidden_states[1:]
        kept = torch.stack([state[:, prompt:] for state in states])
        means = (kept * encoded.mask[None, :, :, None]).sum(2) / encoded.mask.sum(1)[None, :, None]
        weights = torch.tensor([contrast(encoded.keys, value) for value in values])
        here = torch.einsum("vr,lrh->vlh", weights, means)
        total = here if total is None else total + here
    assert total is not None
    return total / len(scenarios)


def kl_of(
    model: Any, tokenizer: Any, places: Sequence[nn.Module], edits: torch.Tensor, texts: Sequence[str]
) -> torch.Tensor:
    """Mean KL divergence of each edit, `[edits, places, hidden]`, from the base model; all edits are rows of a batch."""
    total, tokens = torch.zeros(len(edits)), 0
    with torch.inference_mode():
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"][:160]])
            base = model(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            with added(places, list(edits.transpose(0, 1).unsqueeze(2))):
                logits = model(ids.expand(len(edits), -1), use_cache=False).logits[:, :-1]
            for row in range(len(edits)):
                total[row] += (base.exp() * (base - logits[row].log_softmax(-1))).sum()
            tokens += len(base)
    return total / tokens


def calibrated(
    model: Any, tokenizer: Any, places: Any, edits: torch.Tensor, target: float, texts: int
) -> torch.Tensor:
    """The edits, scaled to cost `target` nats per token."""
    every = load_neutral_texts("calibration", texts)
    for number in range(9):
        kl = kl_of(model, tokenizer, places, edits, every[:2] if number < 4 else every)
        edits = edits * (target / kl.clamp(min=1e-9)).sqrt().clamp(1 / 8, 8)[:, None, None]
        if number >= 4 and float((kl / target - 1).abs().max()) < 0.06:
            break
    return edits


def leave_out(target: str, observed: str) -> tuple[str, ...]:
    return () if observed == target else (target,)


def judged(base: list[dict[str, float]], edited: dict[str, list[dict[str, float]]], sign: int) -> dict[str, Any]:
    """Target shift, leakage, and choices, over all targets; negative strengths are mirrored."""
    values = list(edited)
    table = np.array(
        [
            [
                sign * (np.mean(margins(edited[t], u, leave_out(t, u))) - np.mean(margins(base, u, leave_out(t, u))))
                for u in values
            ]
            for t in values
        ]
    )
    own, other = [], []
    for t in values:
        moves = {
            u: sign * np.array([row[u] - was[u] for row, was in zip(edited[t], base, strict=True)]) for u in values
        }
        for place, u in enumerate(values):
            for w in values[:place]:
                if t in (u, w):
                    own.append(float((moves[t] - moves[w if t == u else u]).mean()))
                else:
                    other.append(abs(float((moves[u] - moves[w]).mean())))
    target = table.diagonal()
    leaks = np.clip(table - np.diag(target), 0, None).sum(1) / (len(values) - 1)
    return {
        "target": float(target.mean()),
        "right_direction": int((target > 0).sum()),
        "nlr": float(leaks.sum() / target.sum()),
        "own": float(np.mean(own)),
        "other": float(np.mean(other)),
        "own_over_other": float(np.mean(own) / np.mean(other)),
        "per_value": dict(zip(values, map(float, target), strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("map", help="a neuron map: folder or repository")
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, default=None, help="scenarios of the split")
    parser.add_argument("--train-limit", type=int, default=None, help="scenarios that CAA learns from")
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 15, 18])
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--target-kl", type=float, default=0.05)
    parser.add_argument("--signs", type=int, nargs="+", default=[1, -1])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/against_caa.json"))
    options = parser.parse_args()
    started = time.time()
    neuron_map = NeuronMap.from_pretrained(options.map)
    values = neuron_map.values
    model, tokenizer = load_base(neuron_map.base_model)
    model.requires_grad_(False)
    blocks = list(decoder_blocks(model)[1])
    downs = dict(model.named_modules())
    names = list(neuron_map.modules)
    writes = torch.zeros(len(values), len(names), model.config.hidden_size)
    for place, name in enumerate(names):
        # What a shift writes: the down projection's columns of the edited neurons.
        layer = NeVALayer(downs[name], "default", neuron_map.config, name)
        writes[:, place] = neuron_map.modules[name].shift @ layer.columns(neuron_map.modules[name].index)
    found = residual_contrasts(model, tokenizer, values, options.train_limit)
    methods: dict[str, tuple[list[nn.Module], torch.Tensor]] = {"neva": ([downs[name] for name in names], writes)}
    for layer_number in options.layers:
        methods[f"caa, layer {layer_number}"] = ([blocks[layer_number]], found[:, layer_number : layer_number + 1])
    scenarios = load_scenarios("schwartz", options.split, limit=options.limit)
    base = scenario_log_probs(model, tokenizer, scenarios)
    rows = []
    for method, (places, edits) in methods.items():
        for sign in options.signs:
            scaled = calibrated(model, tokenizer, places, sign * edits, options.target_kl, options.texts)
            edited = {}
            for row, value in enumerate(values):
                with added(places, list(scaled[row])):
                    edited[value] = scenario_log_probs(model, tokenizer, scenarios)
            rows.append({"method": method, "sign": sign, **judged(base, edited, sign)})
            line = {key: round(item, 3) for key, item in rows[-1].items() if isinstance(item, float)}
            print(f"{method:>14} {sign:+d} {line} [{time.time() - started:.0f} s]", flush=True)
    result = {
        "map": Path(options.map).name,
        "base_model": neuron_map.base_model,
        "split": options.split,
        "scenarios": len(scenarios),
        "target_kl": options.target_kl,
        "neurons": neuron_map.config.provenance.get("neurons"),
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        f"# {result['map']} beside CAA, {len(scenarios)} scenarios of the {options.split} split, KL {options.target_kl}",
        "",
        "| method | strength | target margin | right direction | NLR | own / other |",
        "|---|---:|---:|---:|---:|---:|",
        *(
            f"| {row['method']} | {row['sign']:+d} | {row['target']:+.3f} | {row['right_direction']} of {len(values)} "
            f"| {row['nlr']:.3f} | {row['own_over_other']:.2f} |"
            for row in rows
        ),
    ]
    options.output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
