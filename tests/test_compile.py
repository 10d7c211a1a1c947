"""`torch.compile(fullgraph=True)`: one graph, the same numbers, and no new one when strengths change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_edit_against_reference import KINDS, assert_near
from test_threads import together
from tiny import add_map, batch, random_map, tiny_model, tiny_pair
from torch import nn

from neva_hf.dial import neva_layers

UNIFORM = [{"benevolence": 1.0, "power": -0.5}, {"security": 2.0}, {"power": 0.1, "security": -1.0}]
ROWS = [
    [{"benevolence": 1.0}, {"power": -0.5}, {"security": 1.0}],
    [{"power": 2.0}, {}, {"security": -1.0}],
    [{}, {}, {"benevolence": 0.3}],
]


class Counting:
    """The eager backend, with a count of the graphs that it was given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


def compiled(model: nn.Module, backend: Any) -> Callable[..., torch.Tensor]:
    run = torch.compile(model, backend=backend, fullgraph=True)

    def logits(**kwargs: Any) -> torch.Tensor:
        with torch.no_grad():
            return run(**batch(), use_cache=False, **kwargs).logits

    return logits


def eager(model: nn.Module, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(), use_cache=False, **kwargs).logits


@pytest.mark.parametrize(("architecture", "kind"), [*(("llama", kind) for kind in KINDS), ("gpt2", "folded")])
def test_setting_other_strengths_compiles_nothing_new(architecture: str, kind: str) -> None:
    _, model, _ = tiny_pair(architecture, **KINDS[kind])
    model.set_strengths(UNIFORM[0])
    counting = Counting()
    run = compiled(model, counting)
    for strengths in [*UNIFORM, *UNIFORM]:
        model.set_strengths(strengths)
        assert_near(run(), eager(model))
    assert counting.graphs == 1


@pytest.mark.parametrize(
    ("architecture", "dials", "kind"),
    [
        *(pytest.param("llama", ROWS, kind, id=f"llama, rows, {kind}") for kind in KINDS),
        pytest.param("llama", UNIFORM, "folded", id="llama, uniform, folded"),
        pytest.param("opt", ROWS, "gain and gate", id="opt, rows, gain and gate"),
    ],
)
def test_a_context_with_other_strengths_compiles_nothing_new(architecture: str, dials: Any, kind: str) -> None:
    _, model, _ = tiny_pair(architecture, **KINDS[kind])
    counting = Counting()
    run = compiled(model, counting)
    for strengths in [*dials, *dials]:
        with model.strengths(strengths):
            assert_near(run(), eager(model))
    assert counting.graphs == 1


def test_going_to_and_from_zero_compiles_each_path_once() -> None:
    base, model, _ = tiny_pair(gain=True)
    counting = Counting()
    run = compiled(model, counting)
    for _ in range(3):
        model.set_strengths({})
        assert_near(run(), eager(base))
        model.set_strengths(UNIFORM[0])
        assert_near(run(), eager(model))
        with model.strengths(ROWS[0]):
            assert_near(run(), eager(model))
        with model.disable_adapter():
            assert_near(run(), eager(base))
    assert counting.graphs <= 4


@pytest.mark.parametrize(
    ("dial", "kind"),
    [
        pytest.param(ROWS[0], "folded", id="rows, folded"),
        pytest.param(ROWS[0], "gain and gate", id="rows, gain and gate"),
        pytest.param(UNIFORM[0], "folded", id="uniform, folded"),
        pytest.param({}, "gain and gate", id="none"),
    ],
)
def test_there_are_no_graph_breaks(dial: Any, kind: str) -> None:
    _, model, _ = tiny_pair(**KINDS[kind])
    with torch.no_grad(), model.strengths(dial):
        explained = torch._dynamo.explain(model)(**batch(), use_cache=False)
    assert explained.graph_break_count == 0
    assert explained.graph_count == 1


def test_several_active_adapters_compile_to_one_graph() -> None:
    base, model, _ = tiny_pair()
    add_map(model, random_map(base, ["hedonism"], gain=True, gate=True, seed=6), "second")
    model.base_model.set_adapter(["default", "second"])
    counting = Counting()
    run = compiled(model, counting)
    for strengths in ({"power": 1.0, "hedonism": 1.0}, {"power": -1.0, "hedonism": 0.5}):
        model.set_strengths(strengths)
        assert_near(run(), eager(model))
    assert counting.graphs == 1


@pytest.mark.parametrize("way", ["peft", "transformers"])
def test_default_strengths_compile_without_a_call_before(way: str, tmp_path: Path) -> None:
    base, model, neuron_map = tiny_pair(gain=True, default_strengths={"power": 1.0})
    neuron_map.save_pretrained(tmp_path)
    if way == "peft":
        loaded: Any = PeftModel.from_pretrained(tiny_model(), str(tmp_path))
    else:
        loaded = tiny_model()
        loaded.load_adapter(str(tmp_path))
    assert_near(compiled(loaded, Counting())(), eager(model))


def test_calls_with_strengths_run_the_compiled_decoder_layers() -> None:
    # The usual set-up of a server: the layers are compiled, the call that takes strengths is not.
    base, model, _ = tiny_pair(gain=True)
    counting = Counting()
    for layer in model.base_model.model.model.layers:
        layer.compile(backend=counting, fullgraph=True)
    wanted = tiny_pair(gain=True)[1]
    for strengths in [*ROWS, *UNIFORM, *ROWS, *UNIFORM]:
        assert_near(eager(model, strengths=strengths), eager(wanted, strengths=strengths))
    # One graph for the rows and one for uniform strengths; the layers share their code.
    assert counting.graphs <= 4


def test_threads_that_share_a_compiled_model_see_their_own_strengths() -> None:
    _, model, _ = tiny_pair(gain=True)
    run = compiled(model, "eager")

    def job(dial: Any) -> Callable[[], torch.Tensor]:
        def in_context() -> torch.Tensor:
            with model.strengths(dial):
                return run()

        return in_context

    # Compiled in this thread, before any strengths were given in it; run in others.
    run()
    jobs = [run, job(ROWS[0]), job(ROWS[1]), job(UNIFORM[0])]
    wanted = [eager(model), *(eager(model, strengths=dial) for dial in (ROWS[0], ROWS[1], UNIFORM[0]))]
    for one, results in zip(wanted, together(jobs, rounds=4), strict=True):
        for got in results:
            assert_near(got, one)


def test_generation_with_a_compiled_forward_gets_every_step_right() -> None:
    _, model, _ = tiny_pair(gain=True)
    wanted = model.generate(**batch(), strengths=ROWS[1], max_new_tokens=4)
    inner = model.base_model.model
    inner.forward = torch.compile(inner.forward, backend="eager", fullgraph=True, dynamic=True)
    got = model.generate(**batch(), strengths=ROWS[1], max_new_tokens=4)
    assert torch.equal(got, wanted)


def test_inductor_gives_the_edit() -> None:
    # One layer with two adapters, so that one compilation covers folded edits, gains and gates.
    base, model, _ = tiny_pair(gain=True, gate=True)
    add_map(model, random_map(base, ["hedonism"], seed=6), "second")
    model.base_model.set_adapter(["default", "second"])
    layer = neva_layers(model)[0]
    run = torch.compile(layer, fullgraph=True)
    x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), model.strengths([{"power": 1.0, "hedonism": -1.0}, {}, {"security": -1.0}]):
        assert_near(run(x), layer(x))


def test_strengths_in_the_call_of_a_compiled_model_are_right_too() -> None:
    # Checking strengths breaks the graph (a context around the call does not), but may never change the numbers.
    _, model, _ = tiny_pair()
    run = torch.compile(model, backend="eager")
    for strengths in (ROWS[0], {}):
        with torch.no_grad():
            got = run(**batch(), use_cache=False, strengths=strengths).logits
        assert_near(got, eager(model, strengths=strengths))
