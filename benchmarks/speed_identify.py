"""What identification costs beside the bare forward and backward passes that it cannot do without: time and memory.

    python benchmarks/speed_identify.py [--model MODEL] [--device cuda] [--dtype bfloat16]
    python benchmarks/speed_identify.py --quick    # a tiny model: does it run?

**Time.** Every scenario is run by `collect` and by the same model calls alone (the prompt, the replies on its cache, one
backward pass down to the first layer, nothing kept), in turn; every window of neutral text likewise by `fisher_samples`.

**Memory.** The peak of a process of its own for the bare passes, and for identification as scenarios grow 1x, 4x, 16x:
resident memory on a CPU, allocated memory on a GPU. What identification has to keep is known beforehand and shown beside:
`8 * (3 V + 3) * L * N` bytes of statistics and `4 * S * L * N` of Fisher samples, both in the memory of the CPU. (V values,
L layers of N neurons, S samples.)

**Processes.** The same scenarios by one process and by two, each with half of the threads.

**Padding.** The replies of a scenario run together, padded to the longest. Of the tokens run, how many are padding, and how
many would be with the replies sorted by length and cut in two.

**On paper.** What Llama-3-70B takes on 8 GPUs. With P parameters, a forward pass takes `2 P` operations per token, and so
does a backward pass that asks for no gradients of weights. A scenario is `T_p` tokens of prompt (forward) and `T_r` tokens
of replies (forward and backward), a Fisher pass of `w` tokens is one forward and two backward passes for two samples:

    operations = scenarios * (2 P T_p + 4 P T_r) + (S / 2) * w * 6 P
    seconds    = operations * ratio / (GPUs at work * peak * share)

`T_p` and `T_r` are means of the scenarios here (padding included), `ratio` is the measured cost over the bare passes, and
`share` how much of the peak the bare passes reach; it is measured where the peak is known (`--peak`, in operations per
second), else assumed. A model that is spread over 8 GPUs by `device_map` has one of them at work at a time; processes that
hold a whole model each share the scenarios. 140 GB of weights need two GPUs of 80 GB or more, so three to leave room: two
processes on three each.

Written to `benchmarks/results/speed_identify*.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from identification_cost import DRAWS, ROWS, WINDOW, bare_scenario, bare_window
from speed_models import DTYPES, model_named
from timing import RESULTS, compared, in_turn, machine, machine_line, shown, write

from neva_hf import Scenario, load_base, load_scenarios
from neva_hf.architectures import find_down_projections
from neva_hf.identify import collect, fisher_samples
from neva_hf.identify.parallel import processes
from neva_hf.measure import encode
from neva_hf.projection import layer_sizes
from neva_hf.scenarios import load_neutral_texts, scenario_values

SAMPLES = 2048  # as `fisher_samples` has them
BIG = {"name": "Llama-3-70B", "parameters": 70.6e9, "layers": 80, "neurons": 28672, "scenarios": 400}
GPUS, PEAK, SHARE = 8, 989e12, 0.4  # H100 in bfloat16, and what long batches usually reach of it


def loaded(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model and its tokenizer. Shapes with random weights read with the tokenizer of the default base model."""
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    if options.model is None:
        model, tokenizer = load_base(device=options.device, dtype=dtype)
        return model.requires_grad_(False), tokenizer
    tokenizer = load_base()[1]
    return model_named(options.model, device, dtype, vocab_size=len(tokenizer)), tokenizer


def scenarios_of(count: int) -> list[Scenario]:
    """So many scenarios, the shipped ones over again where there are fewer."""
    shipped = load_scenarios("schwartz", "train")
    return [shipped[number % len(shipped)] for number in range(count)]


def time_beside_bare(model: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, Any]:
    scenarios = scenarios_of(options.scenarios)
    values = scenario_values(scenarios)
    texts = load_neutral_texts(limit=ROWS)
    device = next(model.parameters()).device
    ids = torch.tensor([tokenizer(text)["input_ids"][:WINDOW] for text in texts], device=device)

    def all_bare() -> None:
        for one in scenarios:
            bare_scenario(model, tokenizer, one)

    passes = {
        "scenarios": {"bare": all_bare, "ours": lambda: collect(model, tokenizer, scenarios, values)},
        "sensitivity": {
            "bare": partial(bare_window, model, ids),
            "ours": lambda: fisher_samples(model, tokenizer, texts, samples=DRAWS * ROWS, window=WINDOW, rows=ROWS),
        },
    }
    return {name: compared(in_turn(runs, options.rounds, device=device), "bare") for name, runs in passes.items()}


def padding(tokenizer: Any, scenarios: Sequence[Scenario]) -> dict[str, float]:
    """How much of what runs is padding, and the mean lengths."""
    prompt, run, own, halves = 0, 0, 0, 0
    for one in scenarios:
        encoded = encode(tokenizer, one)
        lengths = sorted(int(row.sum()) - 1 for row in encoded.mask)
        middle = len(lengths) // 2
        prompt += encoded.prompt.numel()
        own += sum(lengths)
        run += len(lengths) * lengths[-1]
        halves += sum(len(half) * half[-1] for half in (lengths[:middle], lengths[middle:]) if half)
    return {
        "prompt_tokens": round(prompt / len(scenarios), 1),
        "reply_tokens": round(run / len(scenarios), 1),
        "of_reply_tokens": round(1 - own / run, 4),
        "of_all_tokens": round((run - own) / (run + prompt), 4),
        "in_two_batches": round(1 - own / halves, 4),
    }


def child(options: argparse.Namespace) -> dict[str, float]:
    """What one process of its own does: identification or the bare passes on some scenarios."""
    model, tokenizer = loaded(options)
    scenarios = scenarios_of(options.scenarios)
    values = scenario_values(scenarios_of(16))
    cuda = options.device.startswith("cuda")
    alone = torch.cuda.memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    if options.child == "bare":
        for one in scenarios:
            bare_scenario(model, tokenizer, one)
    else:
        collect(model, tokenizer, scenarios, values)
    spent = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": round(spent, 3), "model_bytes": alone, "peak_bytes": peak}


def in_child(options: argparse.Namespace, what: str, scenarios: int, count: int = 1) -> dict[str, float]:
    """Runs [`child`] in a new process, or in several that share the scenarios."""
    given = ["--child", what, "--scenarios", str(scenarios), "--device", options.device, "--dtype", options.dtype]
    given += ["--model", options.model] if options.model else []
    launch = (
        [sys.executable]
        if count == 1
        else [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}"]
    )
    launch += [] if count == 1 else ["--master-port=29577"]
    threads = str(max(torch.get_num_threads() // count, 1))
    done = subprocess.run(
        [*launch, __file__, *given],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": threads},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"A process of the benchmark failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(lines[-1])
    return found


def on_paper(padded: dict[str, float], ratios: dict[str, float], share: float, values: int = 10) -> dict[str, Any]:
    """What the large model takes; the formulas are at the top."""
    parameters, count = float(BIG["parameters"]), int(BIG["scenarios"])  # type: ignore[arg-type]
    size = int(BIG["layers"]) * int(BIG["neurons"])  # type: ignore[call-overload]
    work = {
        "scenarios": count * parameters * (2 * padded["prompt_tokens"] + 4 * padded["reply_tokens"]),
        "sensitivity": SAMPLES / DRAWS * WINDOW * 6 * parameters,
    }
    rows = {}
    for name, operations in work.items():
        busy = operations * ratios[name] / (PEAK * share)
        rows[name] = {
            "operations": operations,
            "minutes_one_gpu_at_work": round(busy / 60, 1),
            "minutes_two_processes": round(busy / 60 / 2, 1),
            "minutes_all_at_work": round(busy / 60 / GPUS, 1),
        }
    memory = {
        "weights": 2 * parameters,
        "statistics": 8 * (3 * values + 3) * size,
        "fisher_samples": 4 * SAMPLES * size,
    }
    return {
        "model": BIG,
        "share_of_peak": share,
        "passes": rows,
        "gigabytes": {k: round(v / 1e9, 1) for k, v in memory.items()},
    }


def markdown(result: dict[str, Any]) -> list[str]:
    lines = [f"# The cost of identification: {result['model']}, {result['options']['dtype']}", ""]
    lines += [machine_line(result["machine"]), "", "## Time beside the bare passes", ""]
    lines += ["| pass | ms | bare ms | ratio |", "|---|---:|---:|---:|"]
    for name, one in result["time"].items():
        cells = [shown(one["ours"]["ms"]), shown(one["bare"]["ms"]), shown(one["ours"]["ratio"])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "## As scenarios grow", ""]
    lines += ["| what | scenarios | processes | seconds | seconds per scenario | peak MB | over the bare passes |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    bare = result["growth"][0]["peak_bytes"]
    for one in result["growth"]:
        each, over = one["seconds"] / one["scenarios"], one["peak_bytes"] / bare
        cells = [one["what"], one["scenarios"], one["processes"], one["seconds"], f"{each:.3g}"]
        lines.append(f"| {' | '.join(map(str, cells))} | {one['peak_bytes'] / 1e6:.0f} | {over:.3f} |")
    kept = result["kept_bytes"]
    lines += ["", f"Statistics take {kept['statistics'] / 1e6:.0f} MB of that, {SAMPLES} Fisher samples would take "]
    lines[-1] += f"{kept['fisher_samples'] / 1e6:.0f} MB."
    pad = result["padding"]
    lines += ["", "## Padding", ""]
    lines += [
        f"A scenario has {pad['prompt_tokens']} tokens of prompt and {pad['reply_tokens']} of replies, padding included. "
    ]
    lines[-1] += (
        f"{100 * pad['of_reply_tokens']:.1f}% of the latter and {100 * pad['of_all_tokens']:.1f}% of all are padding; "
    )
    lines[-1] += f"sorted and cut in two batches it would be {100 * pad['in_two_batches']:.1f}% of the replies'."
    paper = result["on_paper"]
    lines += [
        "",
        f"## On paper: {BIG['name']} on {GPUS} GPUs, {BIG['scenarios']} scenarios, {SAMPLES} Fisher samples",
        "",
    ]
    lines += ["| pass | 10^15 operations | minutes, one GPU at work | two processes | all at work |"]
    lines += ["|---|---:|---:|---:|---:|"]
    for name, one in paper["passes"].items():
        minutes = [one[f"minutes_{what}"] for what in ("one_gpu_at_work", "two_processes", "all_at_work")]
        lines.append(f"| {name} | {one['operations'] / 1e15:.3g} | {' | '.join(map(str, minutes))} |")
    sizes = ", ".join(f"{name.replace('_', ' ')} {size} GB" for name, size in paper["gigabytes"].items())
    lines += [
        "",
        f"At {100 * paper['share_of_peak']:.0f}% of the peak of {PEAK / 1e12:.0f} teraflops per GPU. Memory: {sizes}.",
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="llama-3-8b or tiny (random weights); SmolLM2 when left out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--scenarios", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", type=float, default=None, help="operations per second that the device can do")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds")
    parser.add_argument("--child", default=None, choices=["bare", "ours"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        found = child(options)
        if processes()[0] == 0:
            print(json.dumps(found))
        return
    if options.quick:
        options.model, options.scenarios, options.rounds = "tiny", 2, 2
    few = options.scenarios
    runs = [("bare", few, 1), *(("ours", few * times, 1) for times in (1, 4, 16)), ("ours", few * 4, 2)]
    if torch.device(options.device).type == "cuda" and torch.cuda.device_count() < 2:
        runs.pop()  # two processes need two GPUs
    growth = [
        {"what": what, "scenarios": count, "processes": many, **in_child(options, what, count, many)}
        for what, count, many in runs
    ]
    model, tokenizer = loaded(options)
    times = time_beside_bare(model, tokenizer, options)
    padded = padding(tokenizer, load_scenarios("schwartz", "train"))
    here = padding(tokenizer, scenarios_of(few))
    weights = sum(one.numel() for one in model.parameters())
    operations = few * weights * (2 * here["prompt_tokens"] + 4 * here["reply_tokens"])
    reached = operations / (times["scenarios"]["bare"]["ms"]["median"] / 1000)
    sizes = [layer_sizes(module)[0] for module in find_down_projections(model).values()]
    kept = {"statistics": 8 * (3 * 10 + 3) * sum(sizes), "fisher_samples": 4 * SAMPLES * sum(sizes)}
    share = SHARE if options.peak is None else reached / options.peak
    result = {
        "model": options.model or "HuggingFaceTB/SmolLM2-135M-Instruct",
        "machine": machine(options.device),
        "options": {key: value for key, value in vars(options).items() if key not in ("output", "child")},
        "time": times,
        "growth": growth,
        "kept_bytes": kept,
        "padding": padded,
        "operations_per_second": reached,
        "on_paper": on_paper(padded, {name: one["ours"]["ratio"]["median"] for name, one in times.items()}, share),
    }
    name = "_".join(
        ["speed_identify", options.model or "smollm2", options.device.split(":")[0], *["quick"] * options.quick]
    )
    write(name, result, markdown(result), options.output)


if __name__ == "__main__":
    main()
