"""The second tab: which neurons a value edits, what values share, and what one neuron says."""

from __future__ import annotations

from typing import Any

import gradio as gr

from . import insight
from .circle import STATIC
from .engine import Engine
from .faults import explain
from .shared import QUICK, Shared
from .views import sentence
from .views_map import neuron_facts, neuron_grid, overlap_table


def choices(engine: Engine) -> list[tuple[str, str]]:
    """The values of a map for a list to choose from."""
    return [(engine.label(value), value) for value in engine.values]


def neurons_tab(engine: Engine, first: str) -> dict[str, Any]:
    """Lays the tab out.

    Args:
        engine ([`Engine`]): The page's model.
        first (`str`): The value that is shown.

    Returns:
        `dict`: Its components, for [`wire_neurons`].
    """
    value = gr.Dropdown(choices(engine), value=first, label="Value", elem_id="map-value", filterable=False)
    grid = gr.HTML(
        neuron_grid(engine, first, insight.layers(engine, first)),
        elem_id="neurons",
        apply_default_css=False,
        js_on_load=(STATIC / "neurons.js").read_text(encoding="utf-8"),
    )
    facts = gr.HTML(neuron_facts(engine, None), elem_id="facts", apply_default_css=False)
    shares = gr.HTML(overlap_table(engine, insight.overlap(engine)), elem_id="overlap", apply_default_css=False)
    return {"value": value, "grid": grid, "facts": facts, "shares": shares}


def wire_neurons(shared: Shared, parts: dict[str, Any]) -> None:
    """Connects the tab.

    Args:
        shared ([`Shared`]): The page's components.
        parts (`dict`): From [`neurons_tab`].
    """

    def drawn(map_id: str, value: str) -> tuple[str, str, Any]:
        try:
            mine = shared.engine.for_map(map_id)
            # (a link that chose the value may have something to say there)
            return neuron_grid(mine, value, insight.layers(mine, value)), neuron_facts(mine, None), gr.skip()
        except Exception as error:
            return "", "", sentence(explain(error))

    def looked(map_id: str, event: gr.EventData) -> tuple[str, str]:
        try:
            mine = shared.engine.for_map(map_id)
            module, index = str(event.module), int(event.index)
            return neuron_facts(mine, shared.jobs.look(map_id, module, index)), ""
        except Exception as error:
            return "", sentence(explain(error))

    parts["value"].change(
        drawn, [shared.map_id, parts["value"]], [parts["grid"], parts["facts"], shared.error], **QUICK
    )
    parts["grid"].select(
        looked,
        shared.map_id,
        [parts["facts"], shared.error],
        **{**shared.running, "trigger_mode": "always_last", "show_progress": "hidden"},
    )


def redrawn(engine: Engine, first: str) -> tuple[Any, Any, Any, Any]:
    """The tab for another map and its first value: value, grid, facts, shares."""
    return (
        gr.update(choices=choices(engine), value=first),
        neuron_grid(engine, first, insight.layers(engine, first)),
        neuron_facts(engine, None),
        overlap_table(engine, insight.overlap(engine)),
    )
