"""What an edit adds to a model's work, counted: operations, memory, compiled graphs, Python calls. Never times."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_edit_against_reference import KINDS
from tiny import D_FF, LAYERS, SCENARIOS, VALUES, batch, tiny_pair, tiny_reader, tiny_tokenizer
from transformers.cache_utils import DynamicCache, StaticCache

from neva_hf import NeVAModel, Scenario
from neva_hf.identify import collect, fisher_samples

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
UNIFORM = [{"benevolence": 1.0, "power": -0.5}, {"security": 2.0}, {"power": 0.1, "security": -1.0}]
ROWS = [
    [{"benevolence": 1.0}, {"power": -0.5}, {"security": 1.0}],
    [{"power": 2.0}, {"benevolence": 0.2}, {"security": -1.0}],
    [{"benevolence": 1.0}, {"power": -0.5}, {"benevolence": 0.3}],
]
# How many operations (views apart) a general edit may add to each layer. Lower them when they get fewer.
MOST = {"gain": (2, 5), "gate": (4, 5), "gain and gate": (8, 9)}

each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The counters of the benchmarks."""
    if not BENCHMARKS.is_dir():
        pytest.skip("the benchmarks are not part of an installed package")
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("counting")
    del sys.modules["counting"]


def decode_step(model: Any) -> Callable[[], torch.Tensor]:
    """One token more after a prompt of a batch of three rows; the prompt is run here."""
    cache = DynamicCache(config=model.config)
    inputs = batch()
    with torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True)

    def step() -> torch.Tensor:
        return model(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache, use_cache=True).logits

    return step


def prefill(model: Any, tokens: int = 7) -> Callable[[], torch.Tensor]:
    inputs = batch(tokens=tokens)
    return lambda: model(**inputs, use_cache=False).logits


def inside(model: Any) -> Any:
    """The model that `generate` runs at every step."""
    return model.base_model.model


@each_kind
@pytest.mark.parametrize("run", [decode_step, prefill])
def test_strength_zero_is_the_base_models_work(counting: Any, run: Any, kind: str) -> None:
    base, model, _ = tiny_pair(**KINDS[kind])
    assert counting.operations(run(inside(model))) == counting.operations(run(base))
    model.set_strengths(UNIFORM[0])
    model.set_strengths({})
    assert counting.operations(run(inside(model))) == counting.operations(run(base))
    with model.strengths([{}, {}, {}]):
        assert counting.operations(run(inside(model))) == counting.operations(run(base))


@pytest.mark.parametrize("run", [decode_step, prefill])
def test_a_folded_edit_for_all_rows_adds_no_operation(counting: Any, run: Any) -> None:
    base, model, _ = tiny_pair()
    wanted = counting.operations(run(base))
    model.set_strengths(UNIFORM[0])
    found = counting.operations(run(inside(model)))
    # The bias is a part of the same matmul.
    assert counting.more(found, wanted) == {"addmm": LAYERS, "mm": -LAYERS}
    assert found.made == wanted.made


@pytest.mark.parametrize("run", [decode_step, prefill])
def test_folded_edits_per_row_add_one_addition_to_each_layer(counting: Any, run: Any) -> None:
    base, model, _ = tiny_pair()
    wanted = counting.operations(run(base))
    with model.strengths(ROWS[0]):
        found = counting.operations(run(inside(model)))
    assert counting.more(found, wanted) == {"add": LAYERS}


@pytest.mark.parametrize("kind", MOST)
@pytest.mark.parametrize("run", [decode_step, prefill])
def test_general_edits_add_few_operations(counting: Any, run: Any, kind: str) -> None:
    base, model, _ = tiny_pair(**KINDS[kind])
    wanted = counting.operations(run(base))
    for dial, most in zip((UNIFORM[0], ROWS[0]), MOST[kind], strict=True):
        with model.strengths(dial):
            found = counting.more(counting.operations(run(inside(model))), wanted)
        assert sum(found.values()) <= most * LAYERS, found


@each_kind
@pytest.mark.parametrize("dial", [UNIFORM[0], ROWS[0]], ids=["uniform", "rows"])
def test_nothing_as_large_as_the_activations_of_an_ffn_is_made(counting: Any, kind: str, dial: Any) -> None:
    base, model, _ = tiny_pair(**KINDS[kind])
    wanted = counting.operations(prefill(base))
    with model.strengths(dial):
        found = counting.operations(prefill(inside(model)))
    dense = [Counter({shape: count for shape, count in one.made.items() if D_FF in shape}) for one in (found, wanted)]
    assert dense[1]
    assert dense[0] == dense[1]


@each_kind
@pytest.mark.parametrize("dial", [{}, UNIFORM[0], ROWS[0]], ids=["none", "uniform", "rows"])
def test_work_in_python_does_not_grow_with_tokens(counting: Any, kind: str, dial: Any) -> None:
    _, model, _ = tiny_pair(**KINDS[kind])
    files = ["neva_hf/layer.py", "neva_hf/edit.py", "neva_hf/dial.py", "neva_hf/tuner.py"]
    with torch.no_grad(), model.strengths(dial):
        few, many = (counting.python_calls(prefill(inside(model), tokens), files) for tokens in (4, 64))
    assert few["NeVALayer.forward" if sys.version_info >= (3, 11) else "forward"] == LAYERS
    assert many == few


def test_the_hooks_of_identification_do_as_much_for_long_replies_as_for_short_ones(counting: Any) -> None:
    model, tokenizer = tiny_reader(), tiny_tokenizer()
    scenario = SCENARIOS[0]
    longer = Scenario(scenario.question, {name: f"{reply}, {reply}" for name, reply in scenario.replies.items()})

    def passes(one: Scenario) -> Counter[str]:
        return counting.python_calls(lambda: collect(model, tokenizer, [one], VALUES), ["identify/collect.py"])

    def windows(width: int) -> Counter[str]:
        text = "Water boils at a hundred degrees, and freezes at none. " * 3
        run = {"samples": 2, "rows": 1, "window": width}
        return counting.python_calls(
            lambda: fisher_samples(model, tokenizer, [text], **run), ["identify/sensitivity.py"]
        )

    collect(model, tokenizer, [scenario], VALUES)  # what happens only once
    assert passes(longer) == passes(scenario)
    short, long = windows(8), windows(32)
    # (texts are cut into windows before the pass)
    cut = {name for name in short | long if "_windows" in name}
    assert {name: count for name, count in short.items() if name not in cut} == {
        name: count for name, count in long.items() if name not in cut
    }


def test_loading_a_map_looks_at_the_base_model_twice_and_makes_each_layer_once(counting: Any, tmp_path: Path) -> None:
    base, _, neuron_map = tiny_pair()
    neuron_map.save_pretrained(tmp_path)
    files = ["neva_hf/architectures.py", "neva_hf/dial.py", "neva_hf/layer.py", "neva_hf/fingerprint.py"]
    calls = counting.python_calls(lambda: NeVAModel.from_pretrained(base, tmp_path), files)
    found = Counter[str]()
    for name, count in calls.items():
        found[name.rpartition(".")[2]] += count
    # (before anything is changed, and where PEFT comes in)
    assert found["find_down_projections"] == 2
    assert found["fingerprint"] == 1
    assert found["neva_layers"] <= 2
    assert found["fill"] == LAYERS
    assert found["refresh"] <= 3 * LAYERS


@each_kind
@pytest.mark.parametrize("per_row", [False, True], ids=["uniform", "rows"])
def test_decoding_with_a_static_cache_compiles_once_whatever_the_strengths(
    counting: Any, kind: str, per_row: bool
) -> None:
    _, model, _ = tiny_pair(**KINDS[kind])
    inputs = batch()
    cache = StaticCache(config=model.config, max_cache_len=16)
    torch.compiler.reset()
    run = torch.compile(inside(model), backend="eager", fullgraph=True)
    dials: Any = ROWS if per_row else UNIFORM
    with torch.no_grad():
        inside(model)(**inputs, past_key_values=cache, use_cache=True)
    for number, dial in enumerate([*dials, *dials]):
        with counting.compiling() as graphs, torch.no_grad():
            if per_row:
                with model.strengths(dial):
                    run(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache, use_cache=True)
            else:
                model.set_strengths(dial)
                run(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache, use_cache=True)
        assert (graphs.graphs, graphs.breaks) == (1 if number == 0 else 0, 0)
