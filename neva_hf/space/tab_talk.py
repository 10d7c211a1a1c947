"""The first tab: both chats side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import gradio as gr

from neva_hf.errors import NeVAError

from .circle import STATIC
from .engine import Engine, Exchange
from .faults import explain
from .shared import PRIVATE, QUICK, Shared, sampled
from .state import QUESTIONS, to_link
from .views import Said, conversation, sentence, settings, status

_COPY_LINK = """(query) => {
    const link = location.origin + location.pathname + "?" + query;
    history.replaceState(null, "", "?" + query);
    if (navigator.clipboard) navigator.clipboard.writeText(link).catch(() => {});
    return link;
}"""


def talk_tab(question: gr.Textbox, engine: Engine) -> dict[str, Any]:
    """Lays the tab out. The question comes from outside, since others read it too.

    Args:
        question (`gr.Textbox`): Not rendered yet.
        engine ([`Engine`]): The page's model.

    Returns:
        `dict`: Its components, for [`wire_talk`].
    """
    answers = gr.HTML(
        conversation(engine, []),
        elem_id="answers",
        apply_default_css=False,
        js_on_load=(STATIC / "copy.js").read_text(encoding="utf-8"),
    )
    state = gr.HTML(status("Type a question, or take one of these."), elem_id="status", apply_default_css=False)
    with gr.Row(elem_id="examples"):
        for text in QUESTIONS[:5]:
            one = gr.Button(text, size="sm", elem_classes="nv-example", min_width=0)
            one.click(None, None, question, js=f"() => {json.dumps(text)}", **PRIVATE)
    with gr.Row(elem_id="composer", equal_height=True):
        question.render()
        ask = gr.Button("Ask", variant="primary", elem_id="ask", scale=0, min_width=96)
    with gr.Row(elem_id="actions"):
        again = gr.Button("Same question, these dials", size="sm", elem_id="again", min_width=0)
        stop = gr.Button("Stop", size="sm", elem_id="stop", interactive=False, min_width=0)
        clear = gr.Button("Clear", size="sm", elem_id="clear", min_width=0)
        link = gr.Button("Copy link", size="sm", elem_id="link", min_width=0)
    said: gr.State = gr.State([])
    address = gr.Textbox(visible=False)
    return {
        "answers": answers,
        "state": state,
        "ask": ask,
        "again": again,
        "stop": stop,
        "clear": clear,
        "link": link,
        "said": said,
        "address": address,
    }


def wire_talk(shared: Shared, parts: dict[str, Any]) -> None:
    """Connects the tab.

    Args:
        shared ([`Shared`]): The page's components.
        parts (`dict`): From [`talk_tab`].
    """
    engine, said, question = shared.engine, parts["said"], shared.question
    buttons = [parts["ask"], parts["again"], parts["stop"]]
    outputs = [parts["answers"], parts["state"], shared.error, said, question, *buttons]

    def reply(text: str, before: list[Said], *rest: Any) -> Iterator[tuple[Any, ...]]:
        yield from answered(text, before, before, *rest)

    def repeat(text: str, before: list[Said], *rest: Any) -> Iterator[tuple[Any, ...]]:
        last = before[-1].question if before else text
        for found in answered(last, before[:-1], before, *rest):
            shown = list(found)
            shown[4] = gr.skip() if before else found[4]  # what is being typed stays
            yield tuple(shown)

    def answered(
        text: str,
        before: list[Said],
        fallback: list[Said],
        map_id: str,
        payload: Any,
        *fields: Any,
    ) -> Iterator[tuple[Any, ...]]:
        keep = gr.skip()
        try:
            mine, dials = shared.read(map_id, payload)
            how = sampled(*fields)
            history = [Exchange(one.question, one.base, one.edited) for one in before]
            now = Said(text.strip(), dials)
            wait = status("Waiting for the model…")
            turns = shared.jobs.answers(map_id, how, history, text, dials)
            count = 0
            with closing(turns):
                yield conversation(mine, [*before, now]), wait, "", keep, keep, *_busy(True)
                for turn in turns:
                    count = turn.tokens
                    now = Said(now.question, dials, turn.base, turn.edited, turn.done, turn.note)
                    line = status("Writing…")
                    # (a question stays in its box until it is clear that it can be answered)
                    yield conversation(mine, [*before, now]), line, "", [*before, now], "", *_busy(True)
            done = status(f"Done, {count} tokens. Turn a dial and hear the same question again, or go on.")
            yield conversation(mine, [*before, now]), done, "", [*before, now], keep, *_busy(False)
        except Exception as error:
            try:
                shown = conversation(engine.for_map(map_id), fallback)
            except NeVAError:
                shown = conversation(engine, fallback)
            yield shown, status(""), sentence(explain(error)), fallback, keep, *_busy(False)

    def stopped(before: list[Said], map_id: str) -> tuple[Any, ...]:
        ended = [*before[:-1], _ended(before[-1])] if before else []
        shown = conversation(engine.for_map(map_id), ended)
        return shown, status("Stopped."), "", ended, gr.skip(), *_busy(False)

    def cleared(map_id: str) -> tuple[Any, ...]:
        shown = conversation(engine.for_map(map_id), [])
        return shown, status("Type a question, or take one of these."), "", [], gr.skip(), *_busy(False)

    inputs = [question, said, shared.map_id, shared.dial, *shared.how]
    running = {**shared.running, "show_progress": "minimal", "show_progress_on": [parts["state"]]}
    asked = gr.on([parts["ask"].click, question.submit], reply, inputs, outputs, **running)
    repeated = parts["again"].click(repeat, inputs, outputs, **running)
    parts["stop"].click(stopped, [said, shared.map_id], outputs, cancels=[asked, repeated], **QUICK)
    parts["clear"].click(cleared, [shared.map_id], outputs, cancels=[asked, repeated], **QUICK)

    def linked(text: str, before: list[Said], map_id: str, payload: Any, *fields: Any) -> tuple[str, str]:
        try:
            mine, dials = shared.read(map_id, payload)
            how = sampled(*fields)
            asked_last = text.strip() or (before[-1].question if before else "")
            query = to_link(dials, asked_last, int(how.seed), temperature=how.temperature, gate=how.gate, map=map_id)
            return query, status(f"The link holds {settings(mine, dials)}, the question and the seed.")
        except Exception as error:
            return "", status(explain(error))

    parts["link"].click(linked, inputs, [parts["address"], parts["state"]], **QUICK).then(
        None, parts["address"], parts["address"], js=_COPY_LINK, **PRIVATE
    )

    def turned(before: list[Said], map_id: str, payload: Any) -> Any:
        try:
            dials = shared.read(map_id, payload)[1]
        except NeVAError:
            return gr.skip()
        return gr.update(variant="primary" if before and before[-1].dials != dials else "secondary")

    shared.dial.change(turned, [said, shared.map_id, shared.dial], parts["again"], trigger_mode="always_last", **QUICK)


def _busy(running: bool) -> tuple[Any, Any, Any]:
    """Ask, again and stop: what can be pressed while answers are being written, and when not."""
    return (
        gr.update(interactive=not running),
        gr.update(interactive=not running, variant="secondary"),
        gr.update(interactive=running),
    )


def _ended(one: Said) -> Said:
    return one if one.done else Said(one.question, one.dials, one.base, one.edited, True, "Stopped before the end.")
