"""What identification costs beside the bare forward and backward passes that it cannot do without: time and memory.

    python benchmarks/speed_identify.py [--model MODEL] [--device cuda] [--dtype bfloat16]
    python benchmarks/speed_identify.py --quick    # a tiny model: does it run?

**Time.** Every scenario is run by `collect` and by the same model calls alone (the prompt, the replies on its cache, one
backward pass down to the first layer, nothing kept), in turn; every window of neutral texts by `fisher_samples`, and
every scenario again by `reply_samples`. All of them are for shifts and gains.

**Memory.** The peak of a process of its own for the bare passes, and for identification as scenarios (and the batches of
windows) grow 1x, 4x, 16x: resident memory on a CPU, allocated memory on a GPU. What identification has to keep is known
beforehand and shown beside: `8 * (4 V + 3) * L * N` bytes of statistics, `8 * S * L * N` of Fisher samples and
`16 * V * R * k` of samples of replies, all in the memory of the CPU. (V values, L layers of N neurons, S samples, R
scenarios, at most 256, and k candidates per value, 3,000 as a rule.)

**Processes.** The same scenarios by one process and by two, each with half of the threads.

**Padding.** The replies of a scenario run together, padded to the longest, or in two groups where that saves more than
another pass costs (`neva_hf/identify/lengths.py`). Of the tokens run, how many are padding, and how many would be without
such cuts.

**On paper.** What Llama-3-70B takes on 8 GPUs. With P parameters, a forward pass takes `2 P` operations per token, and so
does a backward pass that asks for no gradients of weights. A scenario is `T_p` tokens of prompt (forward) and `T_r` tokens
of replies (forward and backward), a Fisher pass of `w` tokens is one forward and two backward passes for two samples:

    operations = scenarios * (2 P T_p + 4 P T_r) + (S / 2) * w * 6 P + R * (2 P T_p + 6 P T_r)
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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from identification_cost import DRAWS, ROWS, WINDOW, bare_replies, bare_scenario, bare_window, padding, some_neurons
from speed_models import DTYPES, model_named
from timing import RESULTS, compared, in_turn, machine, machine_line, shown, write

from neva_hf import Scenario, load_base, load_scenarios
from neva_hf.architectures import find_down_projections
from neva_hf.identify import collect, fisher_samples, reply_samples
from neva_hf.identify.parallel import processes
from neva_hf.projection import layer_sizes
from neva_hf.scenarios import load_neutral_texts, scenario_values

SAMPLES, REPLIES, CANDIDATES = 2048, 256, 3000  # as identification has them
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


def windows(model: Any, tokenizer: Any) -> torch.Tensor:
    """What one pass of the samples runs."""
    texts = load_neutral_texts(limit=ROWS)
    return torch.tensor([tokenizer(text)["input_ids"][:WINDOW] for text in texts]).to(next(model.parameters()).device)


def time_beside_bare(model: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, Any]:
    scenarios = scenarios_of(options.scenarios)
    values = scenario_values(scenarios)
    texts = load_neutral_texts(limit=ROWS)
    device = next(model.parameters()).device
    ids = windows(model, tokenizer)

    def all_bare() -> None:
        for one in scenarios:
            bare_scenario(model, tokenizer, one)

    def all_replies() -> None:
        for one in scenarios:
            bare_replies(model, tokenizer, one)

    neurons, drawn = some_neurons(model, len(values)), {"samples": DRAWS * ROWS, "window": WINDOW, "rows": ROWS}
    passes = {
        "scenarios": {"bare": all_bare, "ours": lambda: collect(model, tokenizer, scenarios, values, gains=True)},
        "sensitivity": {
            "bare": partial(bare_window, model, ids),
            "ours": lambda: fisher_samples(model, tokenizer, texts, **drawn, gains=True),
        },
        "replies": {
            "bare": all_replies,
            "ours": lambda: reply_samples(model, tokenizer, scenarios, values, neurons, gains=True),
        },
    }
    return {name: compared(in_turn(runs, options.rounds, device=device), "bare") for name, runs in passes.items()}


def child(options: argparse.Namespace) -> dict[str, float]:
    """What one process of its own does: a pass of identification or its bare passes, on some scenarios or windows."""
    model, tokenizer = loaded(options)
    scenarios = scenarios_of(options.scenarios)
    values = scenario_values(scenarios_of(16))
    cuda = options.device.startswith("cuda")
    alone = torch.cuda.memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    if options.child == "bare scenarios":
        for one in scenarios:
            bare_scenario(model, tokenizer, one)
    elif options.child == "scenarios":
        collect(model, tokenizer, scenarios, values, gains=True)
    elif options.child == "bare replies":
        for one in scenarios:
            bare_replies(model, tokenizer, one)
    elif options.child == "replies":
        reply_samples(model, tokenizer, scenarios, values, some_neurons(model, len(values)), gains=True)
    elif options.child == "bare sensitivity":
        for _ in scenarios:
            bare_window(model, windows(model, tokenizer))
    else:
        samples = DRAWS * ROWS * len(scenarios)
        fisher_samples(model, tokenizer, load_neutral_texts(), samples=samples, window=WINDOW, rows=ROWS, gains=True)
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
        "replies": REPLIES * parameters * (2 * padded["prompt_tokens"] + 6 * padded["reply_tokens"]),
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
        "statistics": 8 * (4 * values + 3) * size,
        "fisher_samples": 8 * SAMPLES * size,
        "reply_samples": 16 * values * REPLIES * CANDIDATES,
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
    lines += ["", "## As scenarios and windows grow", ""]
    lines += [
        "| pass | items | processes | seconds | seconds per item | peak MB | over the model | over the bare passes |"
    ]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|"]
    bare = {one["what"].removeprefix("bare "): one["peak_bytes"] for one in result["growth"] if "bare" in one["what"]}
    for one in result["growth"]:
        each, peak = one["seconds"] / one["items"], one["peak_bytes"]
        over = peak / one["model_bytes"], peak / bare[one["what"].removeprefix("bare ")]
        cells = [one["what"], one["items"], one["processes"], one["seconds"], f"{each:.3g}", f"{peak / 1e6:.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} | {over[0]:.3f} | {over[1]:.3f} |")
    kept = result["kept_bytes"]
    lines += ["", f"Statistics take {kept['statistics'] / 1e6:.0f} MB of that, {SAMPLES} Fisher samples would take "]
    lines[-1] += f"{kept['fisher_samples'] / 1e6:.0f} MB, and those of {REPLIES} scenarios' replies "
    lines[-1] += f"{kept['reply_samples'] / 1e6:.0f} MB."
    pad = result["padding"]
    lines += ["", "## Padding", ""]
    lines += [
        f"A scenario has {pad['prompt_tokens']} tokens of prompt and {pad['reply_tokens']} of replies, padding included. "
    ]
    lines[-1] += (
        f"{100 * pad['of_reply_tokens']:.1f}% of the latter and {100 * pad['of_all_tokens']:.1f}% of all are padding; "
    )
    lines[-1] += (
        f"with the replies of every scenario in one batch it would be {100 * pad['without_cuts']:.1f}% of the "
    )
    lines[-1] += f"replies'. A scenario's replies take {pad['passes']} passes."
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
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        found = child(options)
        if processes()[0] == 0:
            print(json.dumps(found))
        return
    if options.quick:
        options.model, options.scenarios, options.rounds = "tiny", 2, 2
    few = options.scenarios
    runs = [("bare scenarios", few, 1), *(("scenarios", few * times, 1) for times in (1, 4, 16))]
    runs += [("bare sensitivity", few, 1), *(("sensitivity", few * times, 1) for times in (1, 4, 16))]
    runs += [("bare replies", few, 1), *(("replies", few * times, 1) for times in (1, 4))]
    runs += [("scenarios", few * 4, 2)]
    if torch.device(options.device).type == "cuda" and torch.cuda.device_count() < 2:
        runs.pop()  # two processes need two GPUs
    growth = [
        {"what": what, "items": count, "processes": many, **in_child(options, what, count, many)}
        for what, count, many in runs
    ]
    model, tokenizer = loaded(options)
    times = time_beside_bare(model, tokenizer, options)
    train, device = load_scenarios("schwartz", "train"), torch.device(options.device)
    # (on a GPU other cuts are worth their cost)
    padded, on_gpus = (padding(tokenizer, train, where) for where in (device, torch.device("cuda")))
    here = padding(tokenizer, scenarios_of(few), device)
    weights = sum(one.numel() for one in model.parameters())
    operations = few * weights * (2 * here["prompt_tokens"] + 4 * here["reply_tokens"])
    reached = operations / (times["scenarios"]["bare"]["ms"]["median"] / 1000)
    sizes = [layer_sizes(module)[0] for module in find_down_projections(model).values()]
    kept = {"statistics": 8 * (4 * 10 + 3) * sum(sizes), "fisher_samples": 8 * SAMPLES * sum(sizes)}
    kept["reply_samples"] = 16 * 10 * REPLIES * CANDIDATES
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
        "on_paper": on_paper(on_gpus, {name: one["ours"]["ratio"]["median"] for name, one in times.items()}, share),
    }
    name = "_".join(
        ["speed_identify", options.model or "smollm2", options.device.split(":")[0], *["quick"] * options.quick]
    )
    write(name, result, markdown(result), options.output)


if __name__ == "__main__":
    main()
