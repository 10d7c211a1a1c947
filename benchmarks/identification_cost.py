"""What identification costs beside the bare forward and backward passes that it cannot do without.

    python benchmarks/identification_cost.py [--base MODEL] [--scenarios 6] [--repeats 3]

Every scenario is timed in turn with the pass of `neva_hf.identify.collect` and with the same model calls alone: the prompt,
the replies on its cache (in the same groups), and backward passes down to the first layer, with nothing collected. Every
window of neutral text likewise, for the samples of `fisher_samples`, and every scenario again for those of `reply_samples`.
All of them are for shifts and gains. Ratios are of the sums of medians over the repeats, from one process.
Written to `benchmarks/results/identification_cost.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from neva_hf import load_base, load_scenarios
from neva_hf.architectures import find_down_projections
from neva_hf.identify import collect, fisher_samples, reply_samples
from neva_hf.identify.lengths import length_groups, only, worth_of_a_pass
from neva_hf.measure import encode, grouped_log_probs, grouped_logits
from neva_hf.projection import layer_sizes
from neva_hf.scenarios import load_neutral_texts, scenario_values

RESULTS = Path(__file__).parent / "results"
WINDOW, ROWS, DRAWS = 32, 8, 2  # as `fisher_samples` has them


@contextmanager
def differentiable(model: Any) -> Iterator[list[torch.Tensor]]:
    """Makes the embeddings what is differentiated by, so that a backward pass goes through every layer."""
    leaves: list[torch.Tensor] = []

    def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return output
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    handle = model.get_input_embeddings().register_forward_hook(hook)
    try:
        yield leaves
    finally:
        handle.remove()


def bare_scenario(model: Any, tokenizer: Any, scenario: Any) -> None:
    encoded = encode(tokenizer, scenario)
    groups = length_groups(encoded, worth_of_a_pass(next(model.parameters()).device))
    with differentiable(model) as leaves, torch.enable_grad():
        for log_probs in grouped_log_probs(model, [only(encoded, group) for group in groups]):
            torch.autograd.grad(log_probs.sum(), leaves[-1])


def bare_window(model: Any, ids: torch.Tensor) -> None:
    with differentiable(model) as leaves, torch.enable_grad():
        log_probs = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        for draw in range(DRAWS):
            told = log_probs.gather(-1, ids[..., None]).sum()
            torch.autograd.grad(told, leaves[-1], retain_graph=draw + 1 < DRAWS)


def bare_replies(model: Any, tokenizer: Any, scenario: Any) -> None:
    encoded = encode(tokenizer, scenario)
    with differentiable(model) as leaves, torch.enable_grad():
        (logits,) = grouped_logits(model, [encoded])
        told = logits.log_softmax(-1).gather(-1, encoded.replies.to(logits.device)[..., None]).sum()
        for draw in range(DRAWS):
            torch.autograd.grad(told, leaves[-1], retain_graph=draw + 1 < DRAWS)


def some_neurons(model: Any, values: int, count: int = 3000) -> torch.Tensor:
    """As many neurons per value as there are candidates."""
    modules = list(find_down_projections(model).values())
    chosen = torch.zeros(values, len(modules), layer_sizes(modules[0])[0], dtype=torch.bool)
    chosen.flatten(1)[:, :: max(chosen[0].numel() // count, 1)] = True
    return chosen


def padding(tokenizer: Any, scenarios: Sequence[Any], device: torch.device) -> dict[str, float]:
    """How much of what runs is padding, the mean lengths, and how many passes it takes."""
    prompt, own, together, run, passes = 0, 0, 0, 0, 0
    for one in scenarios:
        encoded = encode(tokenizer, one)
        parts = [only(encoded, group) for group in length_groups(encoded, worth_of_a_pass(device))]
        # (the last token of a reply runs through nothing)
        prompt += encoded.prompt.numel()
        own += int(encoded.mask[:, 1:].sum())
        together += encoded.mask[:, 1:].numel()
        run += sum(part.mask[:, 1:].numel() for part in parts)
        passes += len(parts)
    return {
        "prompt_tokens": round(prompt / len(scenarios), 1),
        "reply_tokens": round(run / len(scenarios), 1),
        "passes": round(passes / len(scenarios), 2),
        "of_reply_tokens": round(1 - own / run, 4),
        "of_all_tokens": round((run - own) / (run + prompt), 4),
        "without_cuts": round(1 - own / together, 4),
    }


def seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def ratio_of(pairs: list[tuple[Callable[[], Any], Callable[[], Any]]], repeats: int) -> dict[str, float]:
    """Times pairs of (ours, bare) in turn; sums of medians in seconds, and their ratio."""
    ours, bare = 0.0, 0.0
    for one, other in pairs:
        times = [(seconds(one), seconds(other)) for _ in range(repeats)]
        ours += statistics.median(time for time, _ in times)
        bare += statistics.median(time for _, time in times)
    return {"seconds": round(ours, 3), "bare_seconds": round(bare, 3), "ratio": round(ours / bare, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=None)
    parser.add_argument("--device", default=None)
    parser.add_argument("--scenarios", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model, tokenizer = load_base(options.base, device=options.device)
    model.requires_grad_(False)
    scenarios = load_scenarios("schwartz", "train", limit=options.scenarios)
    values = scenario_values(scenarios)
    collect(model, tokenizer, scenarios[:1], values, gains=True)  # what happens only once is not timed
    neurons = some_neurons(model, len(values))
    device = next(model.parameters()).device
    text = load_neutral_texts(limit=8)
    ids = torch.tensor([tokenizer(one)["input_ids"][:WINDOW] for one in text], device=device)
    # (the other calls of one pass, cutting texts among them, belong to what it costs)
    found = {
        "scenarios": ratio_of(
            [
                (
                    lambda one=one: collect(model, tokenizer, [one], values, gains=True),
                    lambda one=one: bare_scenario(model, tokenizer, one),
                )
                for one in scenarios
            ],
            options.repeats,
        ),
        "sensitivity": ratio_of(
            [
                (
                    lambda: fisher_samples(
                        model, tokenizer, text, samples=DRAWS * ROWS, window=WINDOW, rows=ROWS, gains=True
                    ),
                    lambda: bare_window(model, ids),
                )
            ]
            * options.scenarios,
            options.repeats,
        ),
        "replies": ratio_of(
            [
                (
                    lambda one=one: reply_samples(model, tokenizer, [one], values, neurons, gains=True),
                    lambda one=one: bare_replies(model, tokenizer, one),
                )
                for one in scenarios
            ],
            options.repeats,
        ),
    }
    result = {
        "base": options.base or "HuggingFaceTB/SmolLM2-135M-Instruct",
        "device": str(device),
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "passes": found,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "identification_cost.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        f"# The cost of identification, {result['base']} on {result['device']}, {result['threads']} thread(s)",
        "",
        "| pass | seconds | bare passes | ratio |",
        "|---|---:|---:|---:|",
        *(f"| {name} | {one['seconds']} | {one['bare_seconds']} | {one['ratio']} |" for name, one in found.items()),
    ]
    (RESULTS / "identification_cost.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
