"""What the parts of the page have in common: the components that several of them read, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from neva_hf.errors import NeVAError

from .circle import read_dials
from .engine import Engine
from .jobs import Jobs, Sampled
from .state import Dials

MODEL = "model"
"""All calls of the model stand in one line (`concurrency_id`)."""

PRIVATE: dict[str, Any] = {"api_visibility": "private"}
"""The page's own events are no API: api.py has that."""

QUICK: dict[str, Any] = {**PRIVATE, "queue": False, "show_progress": "hidden"}
"""For events that only read the map."""


@dataclass(frozen=True)
class Shared:
    """The page's model and the components that all parts read.

    Args:
        engine ([`Engine`]): The page's own map.
        jobs ([`Jobs`]): What runs on the GPU.
        at_once (`int`): How many calls of the model Gradio lets through; the others see their place in the line.
        dial (`gr.HTML`): The control.
        map_id (`gr.State`): The visitor's map, `""` for the page's own.
        question, seed, temperature, tokens, gate: As they are called.
        error (`gr.HTML`): Where a sentence about an error goes.
    """

    engine: Engine
    jobs: Jobs
    at_once: int
    dial: gr.HTML
    map_id: gr.State
    question: gr.Textbox
    seed: gr.Number
    temperature: gr.Slider
    tokens: gr.Slider
    gate: gr.Checkbox
    error: gr.HTML

    @property
    def how(self) -> list[Any]:
        """The inputs that [`sampled`] takes."""
        return [self.seed, self.temperature, self.tokens, self.gate]

    @property
    def running(self) -> dict[str, Any]:
        """What every event that runs the model says to Gradio."""
        return {**PRIVATE, "concurrency_id": MODEL, "concurrency_limit": self.at_once, "trigger_mode": "once"}

    def read(self, map_id: str, payload: Any) -> tuple[Engine, Dials]:
        """The map of a visitor and the dials, checked.

        Raises:
            `NeVAError`: If one of them cannot be used.
        """
        mine = self.engine.for_map(map_id)
        return mine, read_dials(payload, mine)


def sampled(seed: Any, temperature: Any, tokens: Any, gate: Any) -> Sampled:
    """How answers are made, from what the page's fields hold.

    Raises:
        `NeVAError`: For an empty field; the numbers are checked by the engine.
    """
    if seed is None or temperature is None or tokens is None:
        raise NeVAError("The seed, the temperature and the length of the answer must be numbers.")
    return Sampled(seed, tokens, temperature, bool(gate))
