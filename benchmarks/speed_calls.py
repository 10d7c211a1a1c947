"""What happens once rather than per token: setting strengths, loading a map, importing; and scoring with shared prefixes.

    python benchmarks/speed_calls.py [--model MODEL] [--device cuda] [--dtype bfloat16]
    python benchmarks/speed_calls.py --quick    # a tiny model: does it run?

- **Strengths**: `set_strengths` from one mixture of ten values to another, and entering and leaving a context with one
  mixture for all rows, or with eight for eight rows; for maps of shifts, with gains, and with gates.
- **Loading**: a map of ten values, 200 neurons each, from a folder onto a model that is loaded already; its two parts,
  reading and checking the files and putting the layers in, are timed apart as well.
- **Importing**: `import neva_hf` in fresh processes, beside `import peft`, which is most of it, in turn.
- **Scoring**: how many replies per second are scored when those to the same question share its prefix, and when each is
  run with its question. Both give the same numbers, which is checked first.

Written to `benchmarks/results/speed_calls*.json` and `.md`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from speed_identify import loaded
from speed_models import DTYPES, edited_twin, mixtures, random_map, twin
from timing import RESULTS, compared, in_turn, machine, machine_line, shown, write

from neva_hf import NeuronMap, NeVAModel, load_scenarios
from neva_hf.evaluation.shared_context import Pair, continuation_log_probs
from neva_hf.measure import encode

KINDS: dict[str, dict[str, bool]] = {"shifts": {}, "gains": {"gain": True}, "gates": {"gate": True}}


def strengths(base: Any, rounds: int, device: torch.device) -> dict[str, Any]:
    found = {}
    for kind, what in KINDS.items():
        model = edited_twin(base, random_map(base, **what))
        mixed = mixtures(model.values, 8)
        turn = [0]

        def set_next(model: Any = model, mixed: Any = mixed, turn: Any = turn) -> None:
            turn[0] += 1
            model.set_strengths(mixed[turn[0] % 8])

        def context(dial: Any, model: Any = model) -> None:
            with model.strengths(dial):
                pass

        runs: dict[str, Callable[[], object]] = {
            "set_strengths": set_next,
            "context, one for all rows": partial(context, mixed[1]),
            "context, eight rows": partial(context, mixed),
        }
        found[kind] = compared(in_turn(runs, rounds, warmup=2, device=device), "set_strengths")
    return found


def loading(base: Any, rounds: int, device: torch.device) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        random_map(base).save_pretrained(folder)
        read = NeuronMap.from_pretrained(folder)
        # Each round needs models that have no map yet.
        bare = [twin(base) for _ in range(2 * (rounds + 1))]
        runs: dict[str, Callable[[], object]] = {
            "files and layers": lambda: NeVAModel.from_pretrained(bare.pop(), folder),
            "files": lambda: NeuronMap.from_pretrained(folder),
            "layers": lambda: read.apply_to(bare.pop()),
        }
        return compared(in_turn(runs, rounds, device=device), "files and layers")


def importing(rounds: int) -> dict[str, Any]:
    def fresh(package: str) -> None:
        subprocess.run([sys.executable, "-c", f"import {package}"], check=True, capture_output=True)

    runs = {name: partial(fresh, name) for name in ("peft", "neva_hf")}
    return compared(in_turn(runs, rounds, warmup=min(rounds - 1, 1)), "peft")


def scoring(model: Any, tokenizer: Any, count: int, rounds: int, device: torch.device) -> dict[str, Any]:
    pairs: list[Pair] = []
    for scenario in load_scenarios("schwartz", "dev", limit=count):
        encoded = encode(tokenizer, scenario)
        for reply, mask in zip(encoded.replies, encoded.mask, strict=True):
            pairs.append((encoded.prompt[0].tolist(), reply[: int(mask.sum())].tolist()))

    def run(share: bool) -> Sequence[tuple[float, bool]]:
        return continuation_log_probs(model, pairs, share=share)

    shared, alone = ([total for total, _ in run(share)] for share in (True, False))
    differ = max(abs(one - other) for one, other in zip(shared, alone, strict=True))
    if differ > (1e-2 if next(model.parameters()).dtype == torch.float32 else 2.0):
        raise SystemExit(f"Shared prefixes give other log-probabilities, by {differ:.3g} nats.")
    runs = {"each with its question": partial(run, False), "shared prefixes": partial(run, True)}
    found = compared(in_turn(runs, rounds, warmup=0, device=device), "each with its question")
    for one in found.values():
        one["per_second"] = round(1000 * len(pairs) / one["ms"]["median"], 3)
    return {"replies": len(pairs), "differ_by": differ, "runs": found}


def table(found: dict[str, Any], ratio: str) -> list[str]:
    lines = [f"| | ms | ratio to {ratio} |", "|---|---:|---:|"]
    return [*lines, *(f"| {name} | {shown(one['ms'])} | {shown(one['ratio'])} |" for name, one in found.items()), ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="llama-3-8b or tiny (random weights); SmolLM2 when left out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--imports", type=int, default=7, help="rounds of importing")
    parser.add_argument("--scenarios", type=int, default=4, help="of which all replies are scored")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds")
    options = parser.parse_args()
    if options.quick:
        options.model, options.rounds, options.imports, options.scenarios = "tiny", 3, 1, 2
    device = torch.device(options.device)
    model, tokenizer = loaded(options)
    where = machine(device)
    found = {
        "strengths": strengths(model, options.rounds, device),
        "loading": loading(model, options.rounds, device),
        "importing": importing(options.imports),
        "scoring": scoring(model, tokenizer, options.scenarios, max(options.rounds // 3, 1), device),
    }
    what = options.model or "SmolLM2-135M-Instruct"
    lines = [f"# What happens once: {what}, {options.dtype}", "", machine_line(where), ""]
    lines += ["Medians, quartiles in brackets.", ""]
    for kind, one in found["strengths"].items():
        lines += [f"## Strengths of a map of {kind}", "", *table(one, "set_strengths")]
    lines += ["## Loading a map of ten values onto a loaded model", "", *table(found["loading"], "both")]
    lines += ["## Importing, in fresh processes", "", *table(found["importing"], "peft")]
    lines += [f"## Scoring {found['scoring']['replies']} replies", ""]
    lines += table(found["scoring"]["runs"], "each with its question")
    rates = [f"{name}: {one['per_second']} per second" for name, one in found["scoring"]["runs"].items()]
    lines += [f"{'; '.join(rates)}. The two differ by at most {found['scoring']['differ_by']:.2g} nats per reply."]
    name = "_".join(["speed_calls", options.model or "smollm2", device.type, *["quick"] * options.quick])
    plain = {key: value for key, value in vars(options).items() if key != "output"}
    write(name, {"model": what, "machine": where, "options": plain, **found}, lines, options.output)


if __name__ == "__main__":
    main()
