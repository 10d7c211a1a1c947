"""The last tab: the current dials as code, as a link and as JSON."""

from __future__ import annotations

from typing import Any

import gradio as gr

from . import take_home
from .circle import STATIC
from .faults import explain
from .shared import QUICK, Shared, sampled
from .views import sentence
from .views_more import code

TITLE = "Take it home"

_BLOCKS = (
    ("Python", "the model and its dials, in a program", take_home.python),
    ("Command line", "a chat with these dials", take_home.command_line),
    ("curl", "the API of this page", take_home.curl),
    ("Stock adapter", "the dials frozen into an adapter that needs PEFT alone", take_home.stock),
    ("JSON", "what exactly is added to which neuron", take_home.edit_json),
)


def take_tab() -> dict[str, Any]:
    """Lays the tab out; returns its components."""
    shown = gr.HTML(
        "",
        elem_id="take",
        apply_default_css=False,
        js_on_load=(STATIC / "copy.js").read_text(encoding="utf-8"),
    )
    return {"shown": shown}


def wire_take(shared: Shared, parts: dict[str, Any], tabs: gr.Tabs, here: gr.Textbox) -> None:
    """Connects the tab.

    Args:
        shared ([`Shared`]): The page's components.
        parts (`dict`): From [`take_tab`].
        tabs (`gr.Tabs`): All tabs; the code is made when this one is opened, and while it is open.
        here (`gr.Textbox`): The address of the page.
    """
    is_open: gr.State = gr.State(False)

    def made(wanted: bool, map_id: str, payload: Any, question: str, where: str, *fields: Any) -> tuple[Any, str]:
        if not wanted:
            return gr.skip(), gr.skip()
        try:
            mine, dials = shared.read(map_id, payload)
            how = sampled(*fields)
            blocks = [
                (
                    title,
                    what,
                    write(
                        mine,
                        dials,
                        question,
                        int(how.seed),
                        where,
                        max_new_tokens=int(how.max_new_tokens),
                        temperature=how.temperature,
                        gate=how.gate,
                    ),
                )
                for title, what, write in _BLOCKS
            ]
            return code(mine, dials, blocks), ""
        except Exception as error:
            return "", sentence(explain(error))

    def opened(event: gr.SelectData) -> bool:
        return bool(event.value == TITLE)

    inputs = [is_open, shared.map_id, shared.dial, shared.question, here, *shared.how]
    outputs = [parts["shown"], shared.error]
    tabs.select(opened, None, is_open, **QUICK).then(made, inputs, outputs, **QUICK)
    shared.dial.change(made, inputs, outputs, trigger_mode="always_last", **QUICK)
