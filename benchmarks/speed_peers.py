"""The same constant steering done by others, side by side: steering-vectors, repeng, pyvene and plain forward hooks.

    python -m pip install --no-deps steering-vectors==0.12.2 repeng==0.4.0 pyvene==0.1.8   # those that you want to see
    python benchmarks/speed_peers.py [--model MODEL] [--device cuda] [--batch 1] [--quick]

A neuron map at fixed strengths adds one vector to what each FFN writes. On models of Llama's kind that is the same as
adding it to what the decoder block returns, which is where repeng steers. Every package is given these vectors, on a
model of its own that shares its weights with the others. First their logits are compared, at a prompt and at a decode
step: who gives others is not timed. Then prompts and decode steps are timed in turn (timing.py), and operations
counted. Packages that are not installed, or do not run with the installed transformers, are left out, with the reason.

Written to `benchmarks/results/speed_peers*.json` and `.md`.
"""

from __future__ import annotations

import argparse
import importlib
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from counting import more, operations
from speed_models import DTYPES, Decoder, edited_twin, inner, mixtures, model_named, random_map, twin
from timing import RESULTS, compared, in_turn, machine, machine_line, shown, write
from transformers.cache_utils import DynamicCache

from neva_hf.export.fixed import fixed_edits

Vectors = dict[int, torch.Tensor]
Forward = Callable[..., Any]


def by_hooks(model: Any, vectors: Vectors) -> Forward:
    """A forward hook on each FFN, as short as it gets."""
    for layer, vector in vectors.items():
        model.model.layers[layer].mlp.register_forward_hook(lambda _m, _i, output, vector=vector: output + vector)
    return model  # type: ignore[no-any-return]


def by_steering_vectors(model: Any, vectors: Vectors) -> Forward:
    package = importlib.import_module("steering_vectors")
    package.SteeringVector(vectors, "mlp").patch_activations(model)
    return model  # type: ignore[no-any-return]


def by_repeng(model: Any, vectors: Vectors) -> Forward:
    if not hasattr(np, "float_"):
        np.float_ = np.float64  # type: ignore[attr-defined]  # annotations of repeng name it, and numpy 2 dropped it
    package = importlib.import_module("repeng")
    controlled = package.ControlModel(model, list(vectors))
    controlled.set_raw_control(vectors)
    return controlled  # type: ignore[no-any-return]


def by_pyvene(model: Any, vectors: Vectors) -> Forward:
    package = importlib.import_module("pyvene")
    steered = package.IntervenableModel(
        [
            {
                "layer": layer,
                "component": "mlp_output",
                "intervention_type": package.AdditionIntervention,
                "source_representation": vector,
            }
            for layer, vector in vectors.items()
        ],
        model,
    )
    steered.set_device(next(model.parameters()).device)

    def forward(**inputs: Any) -> Any:
        return steered(base=inputs)[1]

    return forward


PEERS: dict[str, tuple[str | None, Callable[[Any, Vectors], Forward]]] = {
    "forward hooks": (None, by_hooks),
    "steering-vectors": ("steering-vectors", by_steering_vectors),
    "repeng": ("repeng", by_repeng),
    "pyvene": ("pyvene", by_pyvene),
}


def steered(base: Any, vectors: Vectors) -> tuple[dict[str, Forward], dict[str, str]]:
    """What of the peers runs: name -> how it is called; and why the others do not."""
    found, missing = {}, {}
    for name, (package, make) in PEERS.items():
        model = twin(base)
        try:
            shown_name = name if package is None else f"{name} {version(package)}"
            found[shown_name] = make(model, vectors)
        except (PackageNotFoundError, ImportError) as error:
            missing[name] = f"not installed ({error})"
        except Exception as error:  # whatever a package that was made for other versions may do
            missing[name] = f"does not run here ({type(error).__name__}: {error})"[:200]
    return found, missing


def prefill(forward: Forward, config: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        cache = DynamicCache(config=config)
        logits: torch.Tensor = forward(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="llama-3-8b or tiny (random weights), or a real model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds")
    options = parser.parse_args()
    if options.quick:
        options.model, options.prompt, options.steps, options.rounds = "tiny", 8, 2, 3
    device = torch.device(options.device)
    base = model_named(options.model, device, DTYPES[options.dtype])
    ours = edited_twin(base, random_map(base))
    strengths = mixtures(ours.values, 1)[0]
    ours.set_strengths(strengths)
    edits = fixed_edits(ours, strengths)
    vectors = {int(name.split(".")[2]): one.shift.to(device, DTYPES[options.dtype]) for name, one in edits.items()}
    found, missing = steered(base, vectors)
    models: dict[str, Forward] = {"base": base, "neva-hf": inner(ours), **found}
    ids = torch.randint(
        3, base.config.vocab_size, (options.batch, options.prompt), generator=torch.Generator().manual_seed(1)
    )
    ids = ids.to(device)

    prompts: dict[str, Callable[[], torch.Tensor]] = {}
    decoders: dict[str, Decoder] = {}
    differs: dict[str, float] = {}
    for name, forward in models.items():
        run = partial(prefill, forward, base.config, ids)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                decoder = Decoder.of(forward, ids, options.steps, base.config)
                with torch.no_grad():
                    logits = torch.cat([run(), decoder.step()], dim=1).float()
                decoder.rewind()
        except Exception as error:  # as above
            if name in ("base", "neva-hf"):
                raise
            missing[name] = f"does not run here ({type(error).__name__}: {error})"[:200]
            continue
        if name == "neva-hf":
            wanted = logits
        if name not in ("base", "neva-hf"):
            differs[name] = float((logits - wanted).abs().max() / wanted.abs().max())
            if differs[name] > (1e-4 if options.dtype == "float32" else 3e-2):
                missing[name] = f"gives other logits (by {differs[name]:.2g} of the largest)"
                continue
        prompts[name], decoders[name] = run, decoder

    steps = {name: partial(one.run, options.steps) for name, one in decoders.items()}
    times = {
        "decode": compared(in_turn(steps, options.rounds, device=device), "base", per=options.steps),
        "prefill": compared(in_turn(prompts, options.rounds, device=device), "base"),
    }
    counts = {name: operations(partial(one.run, 1)) for name, one in decoders.items()}
    added = {name: sum(more(one, counts["base"]).values()) / len(vectors) for name, one in counts.items()}
    where = machine(device)
    what = options.model or "SmolLM2-135M-Instruct"
    lines = [
        f"# The same steering by others: {what}, {options.dtype}, batch {options.batch}",
        "",
        machine_line(where),
        "",
    ]
    lines += ["Medians, quartiles in brackets. Ratios are to the model without edits in the same round.", ""]
    lines += [
        "| | ms per decode step | ratio | ms per prompt | ratio | operations per layer | logits differ by |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in prompts:
        cells = [shown(times[phase][name][key]) for phase in times for key in ("ms", "ratio")]
        difference = f"{differs[name]:.1g}" if name in differs else ""
        lines.append(f"| {' | '.join([name, *cells, f'{added[name]:g}', difference])} |")
    lines += ["", *(f"- {name}: {why}" for name, why in missing.items())]
    result = {"model": what, "machine": where, "options": {**vars(options), "output": None}, "times": times}
    name = "_".join(["speed_peers", options.model or "smollm2", device.type, *["quick"] * options.quick])
    write(
        name, {**result, "operations_per_layer": added, "differs": differs, "missing": missing}, lines, options.output
    )


if __name__ == "__main__":
    main()
