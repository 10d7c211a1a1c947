"""What edits cost a model that writes: decode steps and prompts, beside the same model without them.

    python benchmarks/speed_decode.py            # SmolLM2-135M-Instruct on the CPU
    python benchmarks/speed_decode.py --model llama-3-8b --device cuda --dtype bfloat16 --modes eager compile \\
        --batches 1 8 64
    python benchmarks/speed_decode.py --quick    # a tiny model: does it run?

A map of ten values with 200 neurons each, all ten dialled at once: `zero` (the map is there, all strengths 0), `uniform`
(one mixture for all rows, folded), `rows` (eight mixtures in turn, one per row; from batch 2 on), `gain` and `gate`
(uniform, but what is added depends on the activations). Every kind of edit sits on a model of its own, all of them share
their weights, and what `generate` runs at each step is run: one token per row on a key-value cache. Rounds go through
all kinds in turn; ratios are of the same round (timing.py).

Beside the times stands what does not depend on the machine: the operations that an edit adds to each layer (in eager
mode), the kernels that it adds on a GPU, the graphs that break, and those compiled anew when strengths change. Compiled
decoding uses a static cache, and CUDA graphs on a GPU; prompts are timed in eager mode only. What is finished is kept in
`benchmarks/results/.speed_decode*.state.json`: an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from counting import compiling, kernels, more, operations
from speed_models import DTYPES, Decoder, edited_twin, inner, mixtures, model_named, random_map
from timing import RESULTS, compared, in_turn, machine, machine_line, shown, write
from transformers.cache_utils import DynamicCache

from neva_hf.evaluation.kept import Kept, Piece, work_off

NOTHING = "base"
MAPS: dict[str, dict[str, bool]] = {
    "zero": {},
    "uniform": {},
    "rows": {},
    "gain": {"gain": True},
    "gate": {"gate": True},
}


class Bench:
    """The models that are held against each other."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        base = model_named(options.model, self.device, DTYPES[options.dtype])
        self.models: dict[str, Any] = {NOTHING: base}
        for kind, what in MAPS.items():
            self.models[kind] = edited_twin(base, random_map(base, **what))
        self.values: list[str] = self.models["zero"].values
        self.layers = len(base.model.layers)
        self.vocabulary = int(base.config.vocab_size)

    def kinds(self, batch: int) -> list[str]:
        return [kind for kind in self.models if kind != "rows" or batch > 1]

    def dial(self, kind: str, batch: int, turn: int = 0) -> Any:
        """The strengths of one kind; another turn, other numbers."""
        mixed = mixtures(self.values, batch + turn)[turn:]
        return {} if kind == "zero" else mixed if kind == "rows" else mixed[0]

    def dialled(self, batch: int, stack: ExitStack) -> dict[str, Any]:
        """What runs a step of each kind, with its strengths in force until the stack is unwound."""
        for kind in self.kinds(batch):
            if kind == "rows":
                stack.enter_context(self.models[kind].strengths(self.dial(kind, batch)))
            elif kind != NOTHING:
                self.models[kind].set_strengths(self.dial(kind, batch))
        return {kind: inner(self.models[kind]) for kind in self.kinds(batch)}

    def prompt(self, batch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, self.vocabulary, (batch, self.options.prompt), generator=generator)
        return ids.to(self.device)

    def decode(self, mode: str, batch: int) -> dict[str, Any]:
        options = self.options
        static = mode == "compile"
        torch.compiler.reset()
        gc.collect()
        with ExitStack() as stack:
            ids, decoders, made = self.prompt(batch), {}, {}
            for kind, model in self.dialled(batch, stack).items():
                how: dict[str, Any] = {"fullgraph": True}
                if options.quick:
                    how["backend"] = "eager"
                elif self.device.type == "cuda":
                    how["mode"] = "reduce-overhead"
                forward = torch.compile(model, **how) if static else model
                decoders[kind] = Decoder.of(
                    model, ids, options.steps + 4, model.config, static=static, forward=forward
                )
                with compiling() as made[kind]:
                    decoders[kind].run(3)
            runs = {kind: partial(one.run, options.steps) for kind, one in decoders.items()}
            found = compared(in_turn(runs, options.rounds, device=self.device), NOTHING, per=options.steps)
            for kind, one in decoders.items():
                found[kind] |= {
                    "kernels": kernels(partial(one.run, 1), self.device),
                    "graph_breaks": made[kind].breaks,
                }
            if not static:
                self.count(found, {kind: partial(one.run, 1) for kind, one in decoders.items()})
        if static:
            for kind in found.keys() - {NOTHING}:
                found[kind]["recompiled"] = self.recompiled(kind, decoders[kind], batch)
        return found

    def prefill(self, mode: str, batch: int) -> dict[str, Any]:
        ids = self.prompt(batch)

        def run(model: Any) -> None:
            with torch.no_grad():
                model(
                    input_ids=ids, past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1
                )

        with ExitStack() as stack:
            runs = {kind: partial(run, model) for kind, model in self.dialled(batch, stack).items()}
            found = compared(in_turn(runs, self.options.rounds, device=self.device), NOTHING)
            for kind, one in runs.items():
                found[kind]["kernels"] = kernels(one, self.device)
            self.count(found, runs)
        return found

    def count(self, found: dict[str, Any], runs: dict[str, Callable[[], object]]) -> None:
        """Adds what each kind has more than the base model, in eager mode."""
        counts = {kind: operations(run) for kind, run in runs.items()}
        for kind, one in counts.items():
            added = more(one, counts[NOTHING])
            found[kind] |= {"operations_per_layer": round(sum(added.values()) / self.layers, 2), "operations": added}

    def graphs(self) -> dict[str, Any]:
        """How many graphs the compiler makes of a forward pass of each kind, and how many breaks are in them."""
        found = {}
        with ExitStack() as stack:
            ids = self.prompt(2)[:, :4]
            for kind, model in self.dialled(2, stack).items():
                torch.compiler.reset()
                with torch.no_grad():
                    explained = torch._dynamo.explain(model)(input_ids=ids, use_cache=False)
                found[kind] = {"graphs": explained.graph_count, "breaks": explained.graph_break_count}
        return found

    def recompiled(self, kind: str, decoder: Decoder, batch: int) -> int:
        """How many graphs are compiled when strengths change three times."""
        model = self.models[kind]
        if kind == "zero":
            return 0
        with compiling() as made:
            for turn in (1, 2, 3):
                if kind == "rows":
                    with model.strengths(self.dial(kind, batch, turn)):
                        decoder.run(1)
                else:
                    model.set_strengths(self.dial(kind, batch, turn))
                    decoder.run(1)
        return made.graphs


def table(found: dict[str, Any], layers: int) -> list[str]:
    """One measurement as Markdown."""
    lines = [
        "| edit | ms | ratio to the base model | operations per layer | kernels per layer | graph breaks | recompiled |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    base = found[NOTHING].get("kernels")
    for kind, one in found.items():
        added = None if base is None else f"{(one['kernels'] - base) / layers:+.2f}"
        counts = [one.get("operations_per_layer"), added, one.get("graph_breaks"), one.get("recompiled")]
        cells = [
            kind,
            shown(one["ms"]),
            shown(one["ratio"]),
            *("" if count is None else str(count) for count in counts),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="llama-3-8b or tiny (random weights), or a real model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--modes", nargs="+", default=["eager"], choices=["eager", "compile"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=8, help="decode steps per round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds")
    options = parser.parse_args()
    if options.quick:
        options.model, options.batches, options.rounds, options.steps, options.prompt = "tiny", [1, 8], 3, 2, 8
    torch._dynamo.config.recompile_limit = 64  # all kinds of models share the code that is compiled
    bench = Bench(options)
    name = "_".join(["speed_decode", options.model or "smollm2", bench.device.type, *["quick"] * options.quick])
    where = machine(bench.device)
    plain = {key: value for key, value in vars(options).items() if key not in ("modes", "batches", "output")}
    kept = Kept(
        options.output, f".{name}", {**plain, "machine": {key: one for key, one in where.items() if key != "load"}}
    )
    jobs: list[tuple[str, int, str]] = []
    for mode in options.modes:
        for batch in options.batches:
            jobs += [(mode, batch, "decode")] + [(mode, batch, "prefill")] * (mode == "eager")
    pieces = [
        Piece(
            f"{mode}, batch {batch}, {phase}",
            batch + 8.0 * (mode == "compile"),
            partial(bench.prefill if phase == "prefill" else bench.decode, mode, batch),
        )
        for mode, batch, phase in jobs
    ]
    work_off(kept, [*pieces, Piece("graphs", 8.0, bench.graphs)], partial(print, flush=True))
    found = {piece.name: kept[piece.name] for piece in pieces}
    lines = [f"# Decoding with edits: {options.model or 'SmolLM2-135M-Instruct'}, {options.dtype}", ""]
    lines += [machine_line(where), "", "Medians, quartiles in brackets. Ratios are of the same round.", ""]
    for piece, one in found.items():
        per = "a prompt" if "prefill" in piece else "a step"
        lines += [f"## {piece} (milliseconds for {per})", "", *table(one, bench.layers), ""]
    parts = [f"{kind} {one['graphs']} graph(s), {one['breaks']} break(s)" for kind, one in kept["graphs"].items()]
    lines.append(f"`torch._dynamo.explain` of a forward pass: {'; '.join(parts)}.")
    result = {"model": options.model or "HuggingFaceTB/SmolLM2-135M-Instruct", "machine": where, "options": plain}
    write(name, {**result, "found": found, "graphs": kept["graphs"]}, lines, options.output)


if __name__ == "__main__":
    main()
