"""Two tabs that put the dials to the test: a sweep over one dial, and a blind test of all."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from neva_hf.errors import NeVAError

from . import sweep as sweeping
from . import views_more
from .engine import Engine
from .faults import explain
from .shared import QUICK, Shared, sampled
from .state import QUESTIONS
from .tab_neurons import choices
from .views import sentence, status

_MOST_SEED = 2**31 - 1


@dataclass(frozen=True)
class Round:
    """A blind test: what was shown, and how many guesses were right before.

    Args:
        texts (`tuple[str, str]`): A and B.
        edited_first (`bool`): Whether A is the edited one.
        open (`bool`): Whether a guess is awaited.
        right (`int`): Right guesses so far.
        rounds (`int`): Guesses so far.
    """

    texts: tuple[str, str] = ("", "")
    edited_first: bool = False
    open: bool = False
    right: int = 0
    rounds: int = 0


def sweep_tab(engine: Engine) -> dict[str, Any]:
    """Lays the sweep out; returns its components."""
    gr.HTML('<p class="nv-lead">One question at five strengths of one dial, from little to much, in one batch.</p>')
    with gr.Row():
        value = gr.Dropdown(
            choices(engine),
            value=engine.values[0],
            label="Value",
            elem_id="sweep-value",
            filterable=False,
            min_width=190,
        )
        question = gr.Textbox(QUESTIONS[0], label="Question", scale=3, elem_id="sweep-question")
        run = gr.Button("Sweep", variant="primary", elem_id="sweep-run", scale=0, min_width=110)
    shown = gr.HTML("", elem_id="sweep", apply_default_css=False)
    return {"value": value, "question": question, "run": run, "shown": shown}


def wire_sweep(shared: Shared, parts: dict[str, Any]) -> None:
    """Connects the sweep."""

    def swept(map_id: str, value: str, question: str, *fields: Any) -> Iterator[tuple[str, str]]:
        try:
            mine = shared.engine.for_map(map_id)
            strengths = sweeping.five(mine, value)
            texts = [""] * len(strengths)
            yield views_more.sweep(mine, value, strengths, texts, False), ""
            found = shared.jobs.sweep(map_id, sampled(*fields), question, value, strengths)
            with closing(found):
                for texts in found:
                    yield views_more.sweep(mine, value, strengths, texts, False), ""
            yield views_more.sweep(mine, value, strengths, texts, True), ""
        except Exception as error:
            yield "", sentence(explain(error))

    inputs = [shared.map_id, parts["value"], parts["question"], *shared.how]
    gr.on(
        [parts["run"].click, parts["question"].submit],
        swept,
        inputs,
        [parts["shown"], shared.error],
        **shared.running,
        show_progress="minimal",
    )


def blind_tab() -> dict[str, Any]:
    """Lays the blind test out; returns its components."""
    gr.HTML(
        '<p class="nv-lead">Two answers without names. One comes from the base model, one from your dials. '
        "Can you tell which?</p>"
    )
    with gr.Row():
        question = gr.Textbox(QUESTIONS[0], label="Question", scale=3, elem_id="blind-question")
        deal = gr.Button("Show me two answers", variant="primary", elem_id="blind-deal", scale=0, min_width=220)
    shown = gr.HTML(status("Your score starts at 0."), elem_id="blind", apply_default_css=False)
    with gr.Row():
        first = gr.Button("A is the edited one", interactive=False, elem_id="guess-a")
        second = gr.Button("B is the edited one", interactive=False, elem_id="guess-b")
    return {
        "question": question,
        "deal": deal,
        "shown": shown,
        "first": first,
        "second": second,
        "round": gr.State(Round()),
    }


def wire_blind(shared: Shared, parts: dict[str, Any]) -> None:
    """Connects the blind test."""
    guesses = [parts["first"], parts["second"]]

    def dealt(map_id: str, payload: Any, question: str, now: Round, *fields: Any) -> Iterator[tuple[Any, ...]]:
        shut = [gr.update(interactive=False)] * 2
        try:
            _, dials = shared.read(map_id, payload)
            if not dials:
                raise NeVAError("Turn a dial first: with all dials at 0 both answers are the same.")
            # The order is drawn here, so that nobody can look it up.
            edited_first = sweeping.blind(secrets.randbelow(_MOST_SEED))
            texts = ("", "")
            yield views_more.blind(texts, False), replace(now, open=False), "", *shut
            turns = shared.jobs.answers(map_id, sampled(*fields), [], question, dials)
            with closing(turns):
                for turn in turns:
                    texts = (turn.edited, turn.base) if edited_first else (turn.base, turn.edited)
                    yield views_more.blind(texts, False), gr.skip(), "", *shut
            same = texts[0] == texts[1]
            said = "Both answers are the same: turn a dial further." if same else ""
            waiting = replace(now, texts=texts, edited_first=edited_first, open=not same)
            yield views_more.blind(texts, True, said), waiting, "", *[gr.update(interactive=not same)] * 2
        except Exception as error:
            yield "", replace(now, open=False), sentence(explain(error)), *shut

    def guessed(now: Round, first: bool) -> tuple[Any, ...]:
        if not now.open:
            return gr.skip(), now, *[gr.update(interactive=False)] * 2
        right = now.edited_first == first
        now = replace(now, open=False, right=now.right + right, rounds=now.rounds + 1)
        verdict = f"{'Right' if right else 'Wrong'}. {now.right} of {now.rounds} so far; by chance it would be half."
        shown = views_more.blind(now.texts, True, verdict, now.edited_first)
        return shown, now, *[gr.update(interactive=False)] * 2

    inputs = [shared.map_id, shared.dial, parts["question"], parts["round"], *shared.how]
    gr.on(
        [parts["deal"].click, parts["question"].submit],
        dealt,
        inputs,
        [parts["shown"], parts["round"], shared.error, *guesses],
        **shared.running,
        show_progress="minimal",
    )
    for button, first in zip(guesses, (True, False), strict=True):
        # (bound now, not when it is called)
        def guess(now: Round, first: bool = first) -> tuple[Any, ...]:
            return guessed(now, first)

        button.click(guess, parts["round"], [parts["shown"], parts["round"], *guesses], **QUICK)
