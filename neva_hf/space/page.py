"""The page: where everything stands, and what happens when somebody arrives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from neva_hf._version import __version__
from neva_hf.errors import NeVAError

from . import api, insight
from .circle import STATIC, dial, effects, read_dials, spec
from .engine import Engine
from .faults import explain
from .jobs import Decorator, Jobs, no_gpu
from .shared import MODEL, PRIVATE, QUICK, Shared
from .state import MAX_SEED, QUESTIONS, Dials, Link, from_link, presets_for
from .tab_neurons import choices, neurons_tab, redrawn, wire_neurons
from .tab_take import TITLE, take_tab, wire_take
from .tab_talk import talk_tab, wire_talk
from .tab_tests import blind_tab, sweep_tab, wire_blind, wire_sweep
from .views import conversation, gauge, sentence, status

_KEYS = ("dials", "q", "seed", "t", "gate", "map")
_FIRST = "bold_explorer"
_HERE = "() => [location.origin + location.pathname]"
_READY = "() => { document.body.dataset.neva = 'ready'; }"  # for whoever drives a browser: the link has been read

_HEADER = """<header class="nv-hero"><h1>Dial the values of a language model</h1>
<p>Turn a value up or down on the circle, ask something, and read the same model's answer without and with the edit.
A few hundred of its neurons are edited while it writes; nothing is trained.</p></header>"""


def build(engine: Engine, *, gpu: Decorator = no_gpu, maps: Sequence[str] = ()) -> gr.Blocks:
    """Makes the page.

    Args:
        engine ([`Engine`]): The model.
        gpu (`Callable`): `spaces.GPU`, or nothing where no GPU has to be asked for.
        maps (`Sequence[str]`): Repositories of other maps to offer.

    Returns:
        `gr.Blocks`: Start it with [`launch`].
    """
    jobs = Jobs(engine, gpu)
    # One call at a time uses a CPU best; on ZeroGPU every call has a GPU of its own.
    at_once = 1 if gpu is no_gpu else 8
    start = first_dials(engine)
    begun = insight.expected_of(engine, start)
    with gr.Blocks(title="Dial the values of a language model", analytics_enabled=False) as demo:
        gr.HTML(_HEADER, apply_default_css=False)
        error = gr.HTML("", elem_id="error", apply_default_css=False)
        map_id, here = gr.State(""), gr.Textbox(visible=False)
        question = gr.Textbox(
            QUESTIONS[0],
            label="Your question",
            show_label=False,
            container=False,
            placeholder="Ask something where values matter",
            lines=1,
            max_lines=4,
            elem_id="question",
            scale=1,
            render=False,
        )
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=13, min_width=320, elem_id="left"):
                control = dial(engine, start, begun)
                cost = gr.HTML(gauge(engine, start, begun), elem_id="cost", apply_default_css=False)
                gate = gr.Checkbox(False, **_gate(engine), elem_id="gate")
                with gr.Accordion("Sampling", open=False):
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="seed")
                    temperature = gr.Slider(
                        0, engine.limits.temperature, 0, step=0.1, label="Temperature", info="0: the likeliest words"
                    )
                    most = engine.limits.new_tokens
                    tokens = gr.Slider(8, most, min(96, most), step=8, label="Longest answer, in tokens")
                with gr.Accordion("Another neuron map", open=False):
                    about = gr.HTML(_about(engine), elem_id="about", apply_default_css=False)
                    name = gr.Dropdown(
                        list(maps),
                        value=None,
                        allow_custom_value=True,
                        label="A map on the Hugging Face Hub",
                        info="user/name, made for the base model of this page; empty for the map of this page",
                        elem_id="map-name",
                    )
                    load = gr.Button("Load the map", size="sm", elem_id="map-load")
            with gr.Column(scale=12, min_width=320, elem_id="right"), gr.Tabs(elem_id="tabs") as tabs:
                with gr.Tab("Talk"):
                    talk = talk_tab(question, engine)
                with gr.Tab("Neuron map"):
                    neurons = neurons_tab(engine, _most(engine, start))
                with gr.Tab("Sweep"):
                    sweep = sweep_tab(engine)
                with gr.Tab("Blind test"):
                    blind = blind_tab()
                with gr.Tab(TITLE):
                    take = take_tab()
        shared = Shared(engine, jobs, at_once, control, map_id, question, seed, temperature, tokens, gate, error)
        wire_talk(shared, talk)
        wire_neurons(shared, neurons)
        wire_sweep(shared, sweep)
        wire_blind(shared, blind)
        wire_take(shared, take, tabs, here)

        def turned(where: str, payload: Any) -> tuple[Any, Any]:
            try:
                mine = engine.for_map(where)
                dials = read_dials(payload, mine)
                found = insight.expected_of(mine, dials)
                return gr.update(spec=spec(mine), effects=effects(found)), gauge(mine, dials, found)
            except Exception as fault:
                return gr.skip(), sentence(explain(fault))

        control.change(turned, [map_id, control], [control, cost], trigger_mode="always_last", **QUICK)

        shown = [control, map_id, cost, gate, about, talk["answers"], talk["said"]]
        shown += [neurons["value"], neurons["grid"], neurons["facts"], neurons["shares"], sweep["value"], error]

        def another(wanted: str | None) -> tuple[Any, ...]:
            try:
                mine = engine.for_map((wanted or "").strip())
                return _of_map(mine, "" if mine is engine else mine.source, {}, mine.notice)
            except Exception as fault:
                return *[gr.skip()] * (len(shown) - 1), sentence(explain(fault))

        def arrived(where: str, request: gr.Request) -> tuple[Any, ...]:
            link, mine = read_link(engine, {key: str(text) for key, text in dict(request.query_params).items()})
            page = _of_map(mine, link.map, link.dials, " ".join(link.notes), link.gate)
            # (what the link does not speak of is left alone: the visitor may be quicker than this)
            return *page, where, *(given or gr.skip() for given in (link.question, link.seed, link.temperature))

        load.click(another, name, shown, **{**QUICK, "show_progress": "minimal", "queue": True})
        demo.load(
            arrived, here, [*shown, here, question, seed, temperature], js=_HERE, **{**QUICK, "queue": True}
        ).then(None, js=_READY, **PRIVATE)
        api.endpoints(engine, jobs, {"concurrency_id": MODEL, "concurrency_limit": at_once})
        gr.HTML(_footer(engine), apply_default_css=False)
    return demo.queue(max_size=engine.limits.waiting, default_concurrency_limit=8)


def launch(demo: gr.Blocks, **options: Any) -> tuple[Any, str, str]:
    """Starts the page, and makes sure that it is an MCP server too.

    Args:
        demo (`gr.Blocks`): From [`build`].
        options (`Any`): As for `gr.Blocks.launch`; `prevent_thread_lock=True` does not wait for the end.

    Returns:
        `tuple`: The app, its local address, and its public one if there is one.

    Raises:
        `NeVAError`: If Gradio came without MCP, which it would pass over in silence.
    """
    wait = not options.pop("prevent_thread_lock", False)
    started = demo.launch(**{**looks(), "mcp_server": True, **options}, prevent_thread_lock=True)
    if not demo.mcp_server:
        demo.close()
        raise NeVAError("Gradio started without its MCP server: install it with pip install 'gradio[mcp]'.")
    if wait:
        demo.block_thread()
    return started


def looks() -> dict[str, Any]:
    """Theme and style, for `gr.Blocks.launch`."""
    theme = gr.themes.Soft(
        primary_hue="indigo",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        # The theme's own are too pale to be read by everybody.
        body_text_color_subdued="*neutral_600",
        block_info_text_color="*neutral_600",
        block_title_text_color="*neutral_800",
        block_title_background_fill="none",
        block_title_padding="0",
        block_label_text_color="*neutral_800",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        color_accent="*primary_700",
    )
    frame = (STATIC / "frame.css").read_text(encoding="utf-8")
    return {
        "theme": theme,
        "css_paths": [STATIC / "page.css"],
        "head": f"<style>{frame}</style>",
        "footer_links": ["api", "gradio", "settings"],
    }


def first_dials(engine: Engine) -> Dials:
    """How the dials stand for whoever comes without a link: as in a preset, so that there is something to see."""
    presets = {one.key: one.dials for one in presets_for(engine.values, engine.ranges)}
    return dict(presets.get(_FIRST, {}))


def read_link(engine: Engine, query: dict[str, str]) -> tuple[Link, Engine]:
    """What a visitor's address asks for.

    Args:
        engine ([`Engine`]): The page's model.
        query (`dict[str, str]`): The parameters of the address.

    Returns:
        `tuple[Link, Engine]`: The link, and the engine of its map; the page's own where that cannot be had.
    """
    if not any(key in query for key in _KEYS):
        return Link(dials=first_dials(engine)), engine
    mine, notes = engine, []
    wanted = from_link(query, engine.values, reach=engine.reach).map
    if wanted:
        try:
            mine = engine.for_map(wanted)
            notes = [mine.notice] if mine.notice else []
        except NeVAError as error:
            notes = [explain(error)]
    link = from_link(query, mine.values, reach=mine.reach)
    kept = "" if mine is engine else link.map
    return (
        Link(link.dials, link.question, link.seed, link.temperature, link.gate, kept, (*link.notes, *notes)),
        mine,
    )


def _of_map(mine: Engine, map_id: str, dials: Dials, note: str, gate: bool = False) -> tuple[Any, ...]:
    """Everything on the page that hangs on the map."""
    expected = insight.expected_of(mine, dials)
    value, grid, facts, shares = redrawn(mine, _most(mine, dials))
    return (
        gr.update(value=dict(dials), spec=spec(mine), effects=effects(expected)),
        map_id,
        gauge(mine, dials, expected),
        gr.update(value=gate and mine.has_gate, **_gate(mine)),
        _about(mine),
        conversation(mine, []),
        [],
        value,
        grid,
        facts,
        shares,
        gr.update(choices=choices(mine), value=mine.values[0]),
        sentence(note),
    )


def _most(engine: Engine, dials: Dials) -> str:
    """The value that is turned furthest."""
    return max(engine.values, key=lambda name: abs(dials.get(name, 0.0)))


def _gate(engine: Engine) -> dict[str, Any]:
    info = "Edits then act only as far as each token needs."
    return {"label": "Gate", "info": info, "visible": engine.has_gate}


def _about(engine: Engine) -> str:
    return status(
        f"{engine.name}: {len(engine.values)} values ({engine.system.label}) on {engine.base_name}, "
        f"{sum(int(edits.index.numel()) for edits in engine.map.modules.values())} neurons, "
        f"{'with gains, ' if engine.map.config.use_gain else ''}{'with' if engine.has_gate else 'without'} gates."
    )


def _footer(engine: Engine) -> str:
    return (
        f'<footer class="nv-footer">neva-hf {__version__}. The same model answers twice in one batch; your questions are '
        "not kept. A small model says silly things; none of it is advice.</footer>"
    )
