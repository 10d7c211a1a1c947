"""What a neuron map does, beside CAA at equal damage: control, leakage, choices and perplexity, in one run.

    python benchmarks/map_quality.py MAP --wikitext test.txt
    python benchmarks/map_quality.py MAP --part map & python benchmarks/map_quality.py MAP --part caa  # on two cores,
    python benchmarks/map_quality.py MAP                                                          # and then the report

Both methods learn from the same contrast (caa.py), are scaled to the same KL divergence from the base model on the same
neutral texts, per value and sign, and are measured on the same unseen scenarios. CAA is used at its best layer, chosen on
scenarios of the dev split. Written to `benchmarks/results/map_quality_MAP.json` and `.md`, with a picture in
`docs/images/`. What is finished is kept in `benchmarks/results/.map_quality_*.state.json`: an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from caa import FINE, ROUGH, Contrasts, Setting, Steer, calibrated, costs, log_probs, steer_by
from kept import Kept, Piece, fingerprint, map_fingerprint, work_off
from map_plot import draw
from map_report import markdown, report

from neva_hf import NeuronMap, NeVAModel, load_base, load_scenarios
from neva_hf.architectures import decoder_blocks
from neva_hf.measure import margins
from neva_hf.scenarios import Scenario, load_neutral_texts, scenario_values, scenarios_hash

WINDOW = 512
NEUTRAL_TOKENS = 160  # of each neutral text, as in calibration


class Run:
    """One run: the model, what it is measured on, and the pieces of work."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.map = NeuronMap.from_pretrained(options.map)
        self.values = self.map.values
        base, self.tokenizer = load_base(options.base or self.map.base_model, dtype=options.dtype)
        self.blocks = list(decoder_blocks(base)[1])
        self.model = NeVAModel.from_map(base.requires_grad_(False), self.map)
        self.scenarios = load_scenarios(options.scenarios, options.split, limit=options.limit)
        self.observed = scenario_values(self.scenarios)
        if missing := sorted(set(self.values) - set(self.observed)):
            raise SystemExit(f"The scenarios have no replies of {missing}, which the map holds.")
        depth = len(self.blocks)
        self.layers = options.layers or list(range(round(0.3 * depth), round(0.8 * depth) + 1, 3))
        self.target_kl = options.target_kl or self.map.config.provenance.get("target_kl", 0.05)
        self.texts = self.tokens(load_neutral_texts("heldout", options.texts))
        self.windows = self.wikitext_windows()
        name = Path(options.map).resolve().name
        key = {
            "map": map_fingerprint(self.map),
            "base": [options.base or self.map.base_model, options.dtype],
            "scenarios": [options.split, options.limit, scenarios_hash(self.scenarios)],
        }
        self.kept = Kept(options.output, f"map_quality_{name}", key, options.part or "all")
        # What CAA's pieces depend on besides.
        self.caa = "caa-" + fingerprint(
            [self.layers, options.choose, options.train_limit, options.calibration, self.target_kl]
        )

    def tokens(self, texts: list[str]) -> list[list[int]]:
        return [list(self.tokenizer(text)["input_ids"][:NEUTRAL_TOKENS]) for text in texts]

    def wikitext_windows(self) -> list[list[int]]:
        """The first windows of a text, each behind the token that the model expects at the beginning, if it does."""
        if self.options.wikitext is None:
            return []
        wanted = self.options.windows * WINDOW
        text = self.options.wikitext.read_text(encoding="utf-8")[: wanted * 12]
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"][:wanted]
        start = [token for token in self.tokenizer("")["input_ids"][:1] if token == self.tokenizer.bos_token_id]
        return [start + list(ids[at : at + WINDOW]) for at in range(0, len(ids) - WINDOW + 1, WINDOW)]

    def replies(self, scenarios: list[Scenario], steer: Steer | None, setting: Setting | None) -> Any:
        rows = self.options.rows
        told = [log_probs(self.model, self.tokenizer, one, steer, setting, rows) for one in scenarios]
        return [{key: round(one, 6) for key, one in row.items()} for row in told]

    # The two methods

    def map_steer(self, settings: Any) -> Any:
        dials = [{value: float(sign)} for value, sign in settings]
        return self.model.strengths(dials if len(dials) > 1 else dials[0])

    def caa_layer(self) -> int:
        tried = {layer: self.kept[f"{self.caa}/choose/{layer}"]["target"] for layer in self.layers}
        return max(tried, key=lambda layer: tried[layer])

    def caa_vectors(self, layer: int, sign: int, scales: dict[str, float]) -> dict[Setting, torch.Tensor]:
        found = torch.tensor(self.kept[f"{self.caa}/contrasts"])[:, self.layers.index(layer)]
        return {(value, sign): sign * scales.get(value, 1.0) * found[row] for row, value in enumerate(self.values)}

    def caa_steer(self, settings: Any) -> Any:
        layer, sign = self.caa_layer(), settings[0][1]
        return steer_by(
            self.blocks[layer],
            self.caa_vectors(layer, sign, self.kept[f"{self.caa}/scales/{sign:+d}"]["scales"]),
        )(settings)

    # Pieces

    def contrasts(self) -> Any:
        """The CAA vectors; the sums are kept every few scenarios."""
        scenarios = load_scenarios(self.options.scenarios, "train", limit=self.options.train_limit)
        name = f"{self.caa}/contrasts so far"
        hidden = self.model.get_input_embeddings().weight.shape[1]
        sums = Contrasts(torch.zeros(len(self.values), len(self.layers), hidden), torch.zeros(len(self.values)).long())
        if name in self.kept:
            before = self.kept[name]
            sums = Contrasts(torch.tensor(before["total"]), torch.tensor(before["count"]), before["done"])
        for scenario in scenarios[sums.done :]:
            sums.add(self.model, self.tokenizer, scenario, self.values, self.layers)
            if sums.done % 18 == 0:
                print(f"  contrasts: {sums.done} of {len(scenarios)} scenarios", flush=True)
                kept = {"total": sums.total.tolist(), "count": sums.count.tolist(), "done": sums.done}
                self.kept.put(name, kept)
        return sums.mean().tolist()

    def choose(self, layer: int) -> Any:
        """How far CAA at one layer moves the targets of some dev scenarios, after a rough calibration."""
        if len(self.layers) == 1:
            return {"target": 0.0, "scales": {}}
        texts = self.tokens(load_neutral_texts("calibration", min(ROUGH[0], self.options.calibration)))
        vectors = self.caa_vectors(layer, 1, {})
        rows, block = self.options.rows, self.blocks[layer]
        found = calibrated(self.model, block, vectors, texts, self.target_kl, rows, phases=[ROUGH])
        steer = steer_by(block, self.caa_vectors(layer, 1, found["scales"]))
        scenarios = load_scenarios(self.options.scenarios, "dev", limit=self.options.choose)
        base = self.replies(scenarios, None, None)
        shifts = [
            np.mean(margins(self.replies(scenarios, steer, (value, 1)), value)) - np.mean(margins(base, value))
            for value in self.values
        ]
        print(f"  CAA at layer {layer}: target margin {np.mean(shifts):+.3f}", flush=True)
        return {"target": float(np.mean(shifts)), **found}

    def scales(self, sign: int) -> Any:
        layer = self.caa_layer()
        texts = self.tokens(load_neutral_texts("calibration", self.options.calibration))
        start = self.kept[f"{self.caa}/choose/{layer}"]["scales"]
        vectors = self.caa_vectors(layer, sign, {})
        rows, block = self.options.rows, self.blocks[layer]
        return calibrated(self.model, block, vectors, texts, self.target_kl, rows, scales=start)

    def pieces(self) -> list[Piece]:
        """All that is to be measured, in order; costs are about the tokens that are run."""
        part, rows = self.options.part, len(self.values) + 1
        scenario = 700
        text = rows * NEUTRAL_TOKENS
        window = rows * WINDOW
        found = [
            Piece("base", scenario * len(self.scenarios), lambda: self.replies(self.scenarios, None, None)),
        ]
        methods: list[tuple[str, Steer]] = []
        if part in (None, "map"):
            methods.append(("map", self.map_steer))
        if part in (None, "caa"):
            methods.append((self.caa, self.caa_steer))
            train = self.options.train_limit or 108  # (as many as the shipped set has)
            found.append(Piece(f"{self.caa}/contrasts", 1.4 * scenario * train, self.contrasts))
            for layer in self.layers:
                cost = 3 * ROUGH[0] * text + self.options.choose * rows * scenario if len(self.layers) > 1 else 1
                found.append(Piece(f"{self.caa}/choose/{layer}", cost, partial(self.choose, layer)))
            for sign in self.options.signs:
                cost = 3 * (ROUGH[0] + self.options.calibration) * text
                found.append(Piece(f"{self.caa}/scales/{sign:+d}", cost, partial(self.scales, sign)))
        for method, steer in methods:
            for sign in self.options.signs:
                settings = [(value, sign) for value in self.values]
                for kind, sequences, cost in (("neutral", self.texts, text), ("wikitext", self.windows, window)):
                    if sequences:
                        name = f"{method}/{sign:+d}/{kind}, {len(sequences)}"
                        run = partial(costs, self.model, sequences, steer, settings, self.options.rows)
                        found.append(Piece(name, cost * len(sequences), run))
                for value in self.values:
                    run = partial(self.replies, self.scenarios, steer, (value, sign))
                    found.append(Piece(f"{method}/{sign:+d}/{value}", scenario * len(self.scenarios), run))
        return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("map", help="a neuron map: folder or repository")
    parser.add_argument("--base", help="the base model, if not the one that the map names: folder, GGUF or repository")
    parser.add_argument("--dtype", default="auto", help="the type to compute in")
    parser.add_argument("--scenarios", default="schwartz", help="a shipped set, or a folder with train, dev and test")
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, help="scenarios of the split")
    parser.add_argument("--train-limit", type=int, help="scenarios that CAA learns from")
    parser.add_argument("--layers", type=int, nargs="+", help="of CAA; every third from 30%% to 80%% of the depth")
    parser.add_argument("--choose", type=int, default=4, help="dev scenarios that CAA's layer is chosen on")
    parser.add_argument("--calibration", type=int, default=FINE[0], help="neutral texts that CAA is calibrated on")
    parser.add_argument("--texts", type=int, help="held-out neutral texts")
    parser.add_argument("--wikitext", type=Path, help="a text to measure perplexity on")
    parser.add_argument("--windows", type=int, default=20, help=f"of {WINDOW} tokens, of that text")
    parser.add_argument("--target-kl", type=float, help="what CAA is calibrated to, if not to what the map was")
    parser.add_argument("--signs", type=int, nargs="+", default=[1, -1], choices=[1, -1])
    parser.add_argument("--rows", type=int, default=11, help="at most so many rows in one forward pass")
    parser.add_argument("--part", choices=["map", "caa"], help="only this method, and no report")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--picture", type=Path, help="docs/images/map_quality_MAP.png unless given")
    options = parser.parse_args(arguments)
    run = Run(options)
    work_off(run.kept, run.pieces())
    if options.part:
        print(f"{options.part} is done; run without --part for the report")
        return
    result = report(run)
    name = f"map_quality_{result['map']}"
    (options.output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    words = markdown(result)
    (options.output / f"{name}.md").write_text(words)
    print(words)
    picture = options.picture or Path("docs/images") / f"{name}.png"
    draw(result, picture)
    print(f"picture: {picture}")


if __name__ == "__main__":
    main()
