"""The page of the Space on tiny models, served for a browser."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from space_tools import base_model, tokenizer
from tiny import random_map

from neva_hf.space import page
from neva_hf.space.engine import Engine
from neva_hf.values import load_value_system

SYSTEM = load_value_system("schwartz10")
VALUES = list(SYSTEM.names)
STRENGTHS = [-2.0, -1.0, 1.0, 2.0]


def dose() -> dict[str, Any]:
    """Curves in which a dial moves its own value by 0.3, the next one by 0.06, and costs 0.05 at 1."""
    curves = {}
    for place, value in enumerate(VALUES):
        moved = {seen: [0.0] * 4 for seen in VALUES}
        moved[value] = [0.3 * s for s in STRENGTHS]
        moved[VALUES[(place + 1) % 10]] = [0.06 * s for s in STRENGTHS]
        curves[value] = {"kl": [0.05 * s * s for s in STRENGTHS], "leakage": [0.022] * 4, "margins": moved}
    return {"strengths": STRENGTHS, "scenarios": 1, "texts": 1, "curves": curves}


def page_engine(**map_options: Any) -> Engine:
    """A tiny model with a map of Schwartz's ten values, their ranges and dose curves."""
    base = base_model()
    ranges = {value: [-2.5, 2.5] for value in VALUES}
    options: dict[str, Any] = {"values": VALUES, "ranges": ranges, "measurements": {"dose": dose()}, **map_options}
    return Engine.of(base, tokenizer(), random_map(base, **options), name="tiny-map", source="someone/tiny-map")


@contextmanager
def served(engine: Engine) -> Iterator[str]:
    """The address of the page, for as long as the context is open."""
    demo = page.build(engine)
    try:
        _, address, _ = page.launch(
            demo, server_name="127.0.0.1", server_port=None, quiet=True, prevent_thread_lock=True, ssr_mode=False
        )
        yield address.rstrip("/")
    finally:
        demo.close(verbose=False)


class Brake:
    """Holds a model in the middle of an answer until it is let go."""

    def __init__(self, engine: Engine, after: int) -> None:
        self.reached, self._go, self._left = threading.Event(), threading.Event(), after
        first = engine.model.get_submodule("base_model.model.model.layers.0")
        self._hook = first.register_forward_pre_hook(self._hold)

    def _hold(self, *_: Any) -> None:
        self._left -= 1
        if self._left < 0:
            self.reached.set()
            assert self._go.wait(60)

    def release(self) -> None:
        self._hook.remove()
        self._go.set()
