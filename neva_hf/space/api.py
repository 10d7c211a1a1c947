"""The page's API, with names and types: for `gradio_client`, for `curl`, and for assistants through MCP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, get_type_hints

import gradio as gr

from . import insight
from . import sweep as sweeping
from .engine import Engine
from .faults import refused
from .jobs import Jobs, Sampled
from .take_home import API_NAME


def endpoints(engine: Engine, jobs: Jobs, line: dict[str, Any]) -> None:
    """Adds the endpoints to the page that is being built.

    Args:
        engine ([`Engine`]): The page's model; the API serves its map alone.
        jobs ([`Jobs`]): What runs on the GPU.
        line (`dict`): `concurrency_id` and `concurrency_limit` of calls that run the model.
    """

    def answer(
        question: str,
        dials: dict[str, float],
        seed: int = 0,
        max_new_tokens: int = 120,
        temperature: float = 0.0,
        gate: bool = False,
    ) -> Iterator[tuple[str, str]]:
        """Answers a question twice: as the base model does, and with its values dialled.

        Args:
            question: What is asked.
            dials: Value to strength, such as {"benevolence": 1.5, "power": -0.5}; 1 is the calibrated unit.
            seed: For sampling; the same for both answers.
            max_new_tokens: The longest answer, in tokens.
            temperature: 0 for the likeliest words, above 0 to sample.
            gate: Whether edits act only as far as each token needs, where the map has gates.

        Returns:
            The base model's answer and the edited one.
        """
        try:
            turns = jobs.answers("", Sampled(seed, max_new_tokens, temperature, gate), [], question, dials)
            with closing(turns):
                for turn in turns:
                    yield turn.base, turn.edited
        except Exception as error:
            raise refused(error) from None

    def sweep(question: str, value: str, seed: int = 0, max_new_tokens: int = 80) -> list[dict[str, Any]]:
        """Answers a question at five strengths of one value, from little of it to much.

        Args:
            question: What is asked.
            value: One of `values`.
            seed: For sampling.
            max_new_tokens: The longest answer, in tokens.

        Returns:
            Strength and answer, five of them.
        """
        try:
            strengths = sweeping.five(engine, value)
            *_, texts = jobs.sweep("", Sampled(seed, max_new_tokens), question, value, strengths)
            return [{"strength": s, "answer": text} for s, text in zip(strengths, texts, strict=True)]
        except Exception as error:
            raise refused(error) from None

    def values() -> list[dict[str, Any]]:
        """Lists the values that can be dialled: name, label, definition, and between which strengths text stays fluent."""
        found = []
        for name in engine.values:
            value, (low, high) = engine.system[name], engine.ranges[name]
            found.append(
                {"name": name, "label": value.label, "definition": value.definition, "lowest": low, "highest": high}
            )
        return found

    def expected(dials: dict[str, float]) -> dict[str, Any]:
        """Says what dials do and cost, from curves that were measured when the map was made, without running the model.

        Args:
            dials: Value to strength, such as {"benevolence": 1.5}.

        Returns:
            Shifts of dialled and other values in nats per token, leakage, KL divergence; {} for a map without curves.
        """
        try:
            found = insight.expected_of(engine, dials)
            return {} if found is None else {**vars(found), "beyond": list(found.beyond)}
        except Exception as error:
            raise refused(error) from None

    def neurons(value: str) -> list[dict[str, Any]]:
        """Lists the neurons that a value edits, layer by layer.

        Args:
            value: One of `values`.

        Returns:
            Per layer: its number, module, the neurons, and what strength 1 adds to each: shift + gain * activation.
        """
        try:
            return [dict(vars(one)) for one in insight.layers(engine, value)]
        except Exception as error:
            raise refused(error) from None

    def neuron(module: str, index: int) -> dict[str, Any]:
        """Describes one neuron: its edit and rank for every value that edits it, and the tokens that it speaks for.

        Args:
            module: Its down projection, from `neurons`.
            index: Its number there.

        Returns:
            Layer, shift, gain, score and rank per value, promoted and suppressed tokens.
        """
        try:
            return dict(vars(jobs.look("", module, index)))
        except Exception as error:
            raise refused(error) from None

    # (what the answers are, not that they come one after another)
    gr.api(_typed(answer, tuple[str, str]), api_name=API_NAME, **line)
    gr.api(_typed(sweep), api_name="sweep", **line)
    gr.api(_typed(neuron), api_name="neuron", **line)
    for function in (values, expected, neurons):
        gr.api(_typed(function), api_name=function.__name__, queue=False)


def _typed(function: Callable[..., Any], returns: Any = None) -> Callable[..., Any]:
    """Puts types where Gradio reads them: it does not resolve annotations that are kept as text."""
    hints = get_type_hints(function)
    function.__annotations__ = {**hints, "return": returns or hints["return"]}
    return function
