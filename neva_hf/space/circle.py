"""The control: the values of a map on their circle, with a slider each. Drawn in the browser by `static/dial.js`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from neva_hf.errors import NeVAError

from .engine import Engine
from .insight import Expected
from .state import Dials, presets_for

STATIC = Path(__file__).with_name("static")
_FIRST_HUE = 250.0  # blue at the top of the circle, and round the colour wheel from there


def spec(engine: Engine) -> dict[str, Any]:
    """What the control shows of a map, as plain data for the browser, which sets all of it as text.

    Args:
        engine ([`Engine`]): The page's model.

    Returns:
        `dict`: `values` (name, label, definition, angle, hue, fluent range), `presets` and `reach`.
    """
    values = []
    for place, name in enumerate(engine.values):
        value, (low, high) = engine.system[name], engine.ranges[name]
        # A system without a circle, or a map with some of its values, gets even steps: sectors must not overlap.
        turn = 360.0 * place / len(engine.values)
        values.append(
            {
                "name": name,
                "label": value.label,
                "definition": value.definition,
                "angle": round(turn, 2),
                "hue": round((_FIRST_HUE + turn) % 360, 1),
                "low": low,
                "high": high,
            }
        )
    presets = [
        {"name": one.name, "text": one.text, "dials": one.dials} for one in presets_for(engine.values, engine.ranges)
    ]
    return {"values": values, "presets": presets, "reach": engine.reach}


def dial(engine: Engine, dials: Mapping[str, float], expected: Expected | None) -> gr.HTML:
    """The control as a component; its value is the dials that are not at 0.

    Args:
        engine ([`Engine`]): The page's model.
        dials (`dict[str, float]`): How the dials stand at first.
        expected ([`Expected`], *optional*): What they are expected to do.
    """
    return gr.HTML(
        value=dict(dials),
        html_template="",
        js_on_load=(STATIC / "dial.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        elem_id="dial",
        spec=spec(engine),
        effects=effects(expected),
    )


def effects(expected: Expected | None) -> dict[str, float]:
    """The expected shift of every value, for the line on the circle.

    Args:
        expected ([`Expected`], *optional*): From [`insight.expected_of`].
    """
    return {} if expected is None else {**expected.others, **expected.control}


def read_dials(payload: Any, engine: Engine) -> Dials:
    """What the browser sent, checked.

    Args:
        payload (`Any`): The value of the control.
        engine ([`Engine`]): The page's model.

    Returns:
        `dict[str, float]`: The dials that are not at 0.

    Raises:
        `NeVAError`: If it is no dials, or they cannot be used.
    """
    if not payload:
        return {}
    if not isinstance(payload, Mapping):
        raise NeVAError("The dials did not arrive. Reload the page.")
    return engine.check(payload)
