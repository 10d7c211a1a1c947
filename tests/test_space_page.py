"""The page of the Space without a browser: what it makes of texts, its API, and how it is started."""

from __future__ import annotations

import ast
import asyncio
import logging
import pickle
import re
import runpy
import subprocess
import sys
import types
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

gr = pytest.importorskip("gradio", reason="the page needs neva-hf[space]")

import yaml
from gradio_client import Client
from gradio_client.exceptions import AppError
from space_pages import VALUES, Brake, page_engine, served
from space_tools import idle, saved, tiny_engine
from typer.testing import CliRunner

from neva_hf.cli import app
from neva_hf.errors import NeVAError
from neva_hf.space import insight, page, views, views_map, views_more
from neva_hf.space.circle import read_dials, spec
from neva_hf.space.engine import Engine
from neva_hf.space.faults import explain
from neva_hf.space.jobs import Jobs, Refusal, Sampled, seconds
from neva_hf.space.views import Said

ROOT = Path(__file__).resolve().parents[1]
NASTY = "<script>alert(1)</script><img src=x onerror=alert(2)> **<b>x</b>** &amp;"
MARKUP = re.compile(r"<(script|img|b)\b")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return page_engine()


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    with served(engine) as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> Client:
    return Client(address, verbose=False)


# -- what is shown -----------------------------------------------------------------------------------------------------


def test_no_text_of_a_visitor_or_a_model_becomes_markup(engine: Engine) -> None:
    said = Said(NASTY, {"power": 1.0}, NASTY, f"{NASTY} more {NASTY}", True, NASTY)
    neuron = insight.NeuronFacts(
        "m", 0, 1, {"power": 0.1}, {"power": 0.0}, {"power": 1.0}, {"power": 1}, [NASTY], [NASTY]
    )
    shown = [
        views.conversation(engine, [said]),
        views.sentence(NASTY),
        views.status(NASTY),
        views_more.sweep(engine, "power", [-1.0, 0.0], [NASTY, NASTY], True),
        views_more.blind([NASTY, NASTY], True, NASTY, True),
        views_more.code(engine, {}, [(NASTY, NASTY, NASTY)]),
        views_map.neuron_facts(engine, neuron),
    ]
    for html in shown:
        assert "&lt;script&gt;" in html
        found = {tag for tag in MARKUP.findall(html) if tag != "b"}
        assert found == set()
        assert "<b>x" not in html


@pytest.mark.parametrize(
    ("base", "edited", "done", "place"),
    [
        ("Stay at home.", "Stay and help.", True, 5),
        ("Stay", "Stay", True, None),
        ("Stay at", "Stay at home", False, None),
        ("Stay at", "Stay at home", True, 5),
        ("No", "Yes", True, 0),
        ("", "Yes", False, None),
        ("", "Yes", True, 0),
        ("a b c d", "a b x d", True, 4),
    ],
)
def test_answers_part_at_the_word_in_which_they_differ(base: str, edited: str, done: bool, place: int | None) -> None:
    assert views.parting(base, edited, done) == place


def test_the_words_where_answers_part_are_marked_and_what_they_share_is_not(engine: Engine) -> None:
    html = views.conversation(engine, [Said("q", {}, "Stay at home.", "Stay and help.", True)])
    assert re.findall(r"<mark[^>]*>([^<]*)</mark>", html) == ["at", "and"]
    assert html.count('<span class="nv-same">Stay </span>') == 2
    assert "<mark" not in views.conversation(engine, [Said("q", {}, "Same.", "Same.", True)])


def test_the_gauge_says_what_the_curves_say(engine: Engine) -> None:
    dials = {"power": 2.0}
    expected = insight.expected_of(engine, dials)
    assert expected is not None
    html = views.gauge(engine, dials, expected)
    assert 'role="meter"' in html
    assert f"KL {expected.kl:.3f}" in html
    assert "Leakage 2%" in html
    assert "left:12.5%" in html  # strength 1 on a scale to eight times its cost
    assert "without dose curves" in views.gauge(engine, dials, None)


def test_doses_have_words_that_grow() -> None:
    words = [views.dose_word(0.05 * strength**2) for strength in (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 4.0)]
    assert list(dict.fromkeys(words)) == ["none", "gentle", "clear", "strong", "too strong, the text suffers"]


def test_the_control_has_every_value_in_its_order_with_its_range(engine: Engine) -> None:
    shown = spec(engine)
    assert [value["name"] for value in shown["values"]] == VALUES
    assert [value["angle"] for value in shown["values"]] == [36.0 * place for place in range(10)]
    assert {(value["low"], value["high"]) for value in shown["values"]} == {(-2.5, 2.5)}
    assert len(shown["presets"]) >= 4
    # Another value system has no presets of Schwartz's, and is a circle as well.
    other = spec(tiny_engine(values=["thrift", "courage"]))
    assert other["presets"] == []
    assert [value["angle"] for value in other["values"]] == [0.0, 180.0]


@pytest.mark.parametrize(
    "payload", ["power", ["power"], {"power": "1"}, {"power": 99}, {"courage": 1}, {"power": None}]
)
def test_dials_from_a_browser_are_checked(engine: Engine, payload: Any) -> None:
    with pytest.raises(NeVAError):
        read_dials(payload, engine)


def test_whoever_comes_without_a_link_finds_a_preset(engine: Engine) -> None:
    link, mine = page.read_link(engine, {"__theme": "dark"})
    assert mine is engine
    assert link.dials == page.first_dials(engine) != {}
    assert page.read_link(engine, {"q": "Hm"})[0].dials == {}


def test_every_neuron_of_a_value_is_in_its_picture(engine: Engine) -> None:
    found = insight.layers(engine, "power")
    html = views_map.neuron_grid(engine, "power", found)
    drawn = re.findall(r'data-module="([^"]*)" data-index="(\d+)"', html)
    assert drawn == [(one.module, str(index)) for one in found for index in one.index]
    assert html.count('tabindex="0"') == 1


def facts(gain: float, shift: float = 0.25) -> insight.NeuronFacts:
    return insight.NeuronFacts(
        "m", 0, 1, {"power": shift}, {"power": gain}, {"power": 1.0}, {"power": 1}, ["a"], ["b"]
    )


@pytest.mark.parametrize(
    ("gain", "told"), [(0.234, "× 1.234"), (0.0, "× 1"), (-0.5, "× 0.5"), (-1.25, "× −0.25"), (0.0046, "× 1.005")]
)
def test_a_neuron_of_a_map_with_gains_says_what_its_activation_is_multiplied_by(gain: float, told: str) -> None:
    html = views_map.neuron_facts(page_engine(gain=True), facts(gain))
    assert f'<td><span class="nv-term">{told}</span> <span class="nv-term">+ 0.25</span></td>' in html
    assert '<th scope="col">activation at +1</th>' in html
    assert "the map does not say" in html


def test_a_neuron_of_a_map_without_gains_speaks_of_none(engine: Engine) -> None:
    told = views_map.neuron_facts(engine, facts(0.0))
    grid = views_map.neuron_grid(engine, "power", insight.layers(engine, "power"))
    assert not {"activation", "×", "gain"} & set(re.findall(r"[a-z]+|×", told + grid))
    assert "with gains" not in page._about(engine)
    assert "with gains" in page._about(page_engine(gain=True))


def test_dots_grow_with_shift_and_gain_and_a_gain_alone_is_drawn_as_well() -> None:
    engine = page_engine(gain=True)
    found = [insight.LayerNeurons(0, "m", [1, 2, 3, 4], [0.5, -1.0, 0.0, 0.0], [2.0, 1.0, -2.0, 1.0], 64)]
    html = views_map.neuron_grid(engine, "power", found)
    dots = re.findall(r'nv-neuron (nv-up|nv-down)" cx="[^"]*" cy="[^"]*" r="([^"]*)"', html)
    # Shares of the largest shift and gain: 0.5 + 1, 1 + 0.5, 0 + 1 and 0 + 0.5.
    full, part, half = 2.2 + 4.3, 2.2 + 4.3 / 1.5, 2.2 + 4.3 / 3
    assert [kind for kind, _ in dots] == ["nv-up", "nv-down", "nv-down", "nv-up"]
    assert [float(radius) for _, radius in dots] == pytest.approx([full, full, part, half], abs=0.06)
    assert 'aria-label="Layer 0, neuron 3, activation × −1, shift 0"' in html
    assert "added up" in html
    assert "without a shift" in html


# -- what runs on a GPU ------------------------------------------------------------------------------------------------


def test_jobs_can_be_sent_to_another_process_and_back(engine: Engine) -> None:
    calls: list[tuple[Any, ...]] = []

    def gpu(function: Any, duration: Any) -> Any:
        def sent(*given: Any) -> Any:
            calls.append(given)
            given = pickle.loads(pickle.dumps(given))
            if callable(duration):
                assert 7 <= duration(*given) <= 30
            found = function(*given)
            if isinstance(found, Iterator):
                return (pickle.loads(pickle.dumps(one)) for one in found)
            return pickle.loads(pickle.dumps(found))

        return sent

    jobs = Jobs(engine, gpu)
    dials = {"power": 2.0}
    *_, turn = jobs.answers("", Sampled(3, 8), [], "Hm?", dials)
    *_, alone = engine.stream([], "Hm?", dials, seed=3, max_new_tokens=8)
    assert (turn.base, turn.edited) == (alone.base, alone.edited)
    assert len(list(jobs.sweep("", Sampled(0, 4), "Hm?", "power", [-1.0, 1.0]))[-1]) == 2
    one = insight.layers(engine, "power")[0]
    assert jobs.look("", one.module, one.index[0]) == insight.neuron(engine, one.module, one.index[0])
    assert len(calls) == 3
    for refused in (
        lambda: list(jobs.answers("", Sampled(), [], "", dials)),
        lambda: list(jobs.sweep("nowhere", Sampled(), "Hm?", "power", [1.0])),
        lambda: jobs.look("", one.module, 10**6),
    ):
        with pytest.raises(NeVAError):
            refused()
    assert pickle.loads(pickle.dumps(Refusal("No."))) == Refusal("No.")


def test_a_longer_answer_asks_for_a_gpu_for_longer() -> None:
    asked = [seconds("", Sampled(max_new_tokens=tokens)) for tokens in (1, 60, 120, 256, 10**9)]
    assert asked == sorted(asked)
    assert (asked[0], asked[-1]) == (7, 30)


def test_closing_a_job_stops_the_model(engine: Engine) -> None:
    brake = Brake(engine, after=4)
    try:
        turns = Jobs(engine).answers("", Sampled(max_new_tokens=200), [], "Hm?", {"power": 1.0})
        next(turns)
        assert brake.reached.wait(60)
        turns.close()
    finally:
        brake.release()
    idle(engine)
    assert brake._left > -3  # two more steps at most, of two hundred


# -- faults ------------------------------------------------------------------------------------------------------------


def test_a_fault_of_ours_is_a_sentence_and_no_visitors_words_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    words = "-".join(["what", "I", "asked"])
    with caplog.at_level(logging.DEBUG):
        try:
            raise RuntimeError(words)
        except RuntimeError as error:
            told = explain(error)
    assert words not in told
    assert words not in caplog.text
    assert "RuntimeError" in caplog.text
    assert explain(NeVAError("Turn a\ndial.")) == "Turn a dial."


def test_the_log_holds_no_question(client: Client, capfd: pytest.CaptureFixture[str]) -> None:
    client.predict("my secret question", {"power": 1.0}, 0, 4, api_name="/answer")
    with pytest.raises(AppError):
        client.predict("my secret question", {"secret": 1.0}, 0, 4, api_name="/answer")
    out, err = capfd.readouterr()
    assert "secret" not in out + err


# -- the API -----------------------------------------------------------------------------------------------------------


def test_the_api_has_names_and_types(client: Client) -> None:
    found = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(found) == {"/answer", "/sweep", "/values", "/expected", "/neurons", "/neuron"}
    inputs = {one["parameter_name"]: one["python_type"]["type"] for one in found["/answer"]["parameters"]}
    assert inputs == {
        "question": "str",
        "dials": "dict(str, float)",
        "seed": "int",
        "max_new_tokens": "int",
        "temperature": "float",
        "gate": "bool",
    }
    assert [one["python_type"]["type"] for one in found["/answer"]["returns"]] == ["str", "str"]
    assert all(one["python_type"]["type"] != "Any" for what in found.values() for one in what["returns"])


def test_the_api_answers_as_the_model_does(client: Client, engine: Engine) -> None:
    base, edited = client.predict("Hm?", {"power": 2.0}, 5, 12, 0.8, api_name="/answer")
    *_, alone = engine.stream([], "Hm?", {"power": 2.0}, seed=5, max_new_tokens=12, temperature=0.8)
    assert (base, edited) == (alone.base, alone.edited)
    assert base != edited


def test_the_api_tells_of_values_neurons_and_costs(client: Client, engine: Engine) -> None:
    assert [one["name"] for one in client.predict(api_name="/values")] == VALUES
    told = client.predict({"power": 1.0}, api_name="/expected")
    assert told["kl"] == pytest.approx(0.05)
    assert told["control"] == pytest.approx({"power": 0.3})
    first = client.predict("power", api_name="/neurons")[0]
    one = client.predict(first["module"], first["index"][0], api_name="/neuron")
    assert one["shift"]["power"] == pytest.approx(first["shift"][0])
    assert (one["gain"]["power"], set(first["gain"])) == (0.0, {0.0})
    swept = client.predict("Hm?", "power", 0, 6, api_name="/sweep")
    assert [row["strength"] for row in swept] == [-2.5, -1.25, 0.0, 1.25, 2.5]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("", {"power": 1.0}), "Type a question first"),
        (("Hm?", {"courage": 1.0}), "has no value 'courage'"),
        (("Hm?", {"power": 50.0}), "goes from"),
        (("Hm?", {}, -1), "seed"),
        (("Hm?", {}, 0, 10**6), "length of the answer"),
        (("Hm?" * 5000, {}), "Shorten it"),
    ],
)
def test_the_api_refuses_with_a_sentence(client: Client, given: tuple[Any, ...], told: str) -> None:
    with pytest.raises(AppError, match=told):
        client.predict(*given, api_name="/answer")


def test_the_events_of_the_page_are_no_api(client: Client) -> None:
    assert client.view_api(return_format="dict", print_info=False)["unnamed_endpoints"] == {}


def test_the_page_is_an_mcp_server_with_described_tools(address: str) -> None:
    with urllib.request.urlopen(f"{address}/gradio_api/mcp/schema") as answer:
        tools = {tool["name"]: tool for tool in yaml.safe_load(answer.read())}
    assert {name.rpartition("_")[2] for name in tools} >= {
        "answer",
        "sweep",
        "values",
        "expected",
        "neurons",
        "neuron",
    }
    one = next(tool for name, tool in tools.items() if name.endswith("answer"))
    assert "as the base model does" in one["description"]
    assert "benevolence" in one["inputSchema"]["properties"]["dials"]["description"]


def test_an_assistant_gets_answers_through_mcp(address: str, engine: Engine) -> None:
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def called() -> str:
        async with (
            streamablehttp_client(f"{address}/gradio_api/mcp/") as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            tools = [tool.name for tool in (await session.list_tools()).tools]
            name = next(name for name in tools if name.endswith("answer"))
            found = await session.call_tool(name, {"question": "Hm?", "dials": {"power": 2.0}, "max_new_tokens": 6})
            assert not found.isError
            return "".join(part.text for part in found.content if part.type == "text")

    *_, alone = engine.stream([], "Hm?", {"power": 2.0}, max_new_tokens=6)
    assert ast.literal_eval(asyncio.run(called())) == [alone.base, alone.edited]


def test_a_page_that_would_be_no_mcp_server_does_not_start(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = page.build(engine)
    monkeypatch.setattr(demo, "launch", lambda **options: (None, "", ""))
    with pytest.raises(NeVAError, match=r"gradio\[mcp\]"):
        page.launch(demo, prevent_thread_lock=True)


@pytest.mark.parametrize("gate", [False, True])
def test_the_gate_can_be_switched_where_the_map_has_one(gate: bool) -> None:
    demo = page.build(page_engine(gate=gate))
    (switch,) = [block for block in demo.blocks.values() if getattr(block, "elem_id", None) == "gate"]
    assert switch.visible is gate
    assert switch.value is False


def test_the_line_is_limited(engine: Engine) -> None:
    demo = page.build(engine)
    assert demo._queue.max_size == engine.limits.waiting
    limits = {fn.concurrency_limit for fn in demo.fns.values() if fn.concurrency_id == "model"}
    assert limits == {1}


# -- how it is started -------------------------------------------------------------------------------------------------


def test_neither_the_package_nor_its_command_imports_gradio() -> None:
    code = "import sys, neva_hf, neva_hf.cli, neva_hf.space.engine; assert 'gradio' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_neva_space_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in [name for name in sys.modules if name.startswith("neva_hf.space.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("neva_hf.space.page")
    found = CliRunner().invoke(app, ["space"])
    assert found.exit_code == 1
    assert "pip install 'neva-hf[space]'" in " ".join(found.output.split())


def test_neva_space_opens_the_page(tmp_path: Path) -> None:
    base, folder = saved(tmp_path)
    command = [
        sys.executable,
        "-u",
        "-m",
        "neva_hf.cli",
        "space",
        str(folder),
        "--base",
        str(base),
        "--no-open",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            lines = []
            for line in process.stdout:
                lines.append(line)
                if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                    break
            else:
                raise AssertionError("".join(lines))
            with urllib.request.urlopen(found.group()) as answer:
                assert b"Dial the values" in answer.read()
        finally:
            process.terminate()


@pytest.mark.parametrize("zero_gpu", [False, True])
def test_the_app_of_the_space_is_that_page(engine: Engine, monkeypatch: pytest.MonkeyPatch, zero_gpu: bool) -> None:
    decorated = []

    def gpu(function: Any, duration: Any = None) -> Any:
        decorated.append((function.__name__, duration))
        return function

    monkeypatch.setitem(sys.modules, "spaces", types.SimpleNamespace(GPU=gpu))
    if zero_gpu:
        monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    else:
        monkeypatch.delenv("SPACES_ZERO_GPU", raising=False)
    monkeypatch.setenv("NEVA_MAPS", "someone/one, someone/two")
    monkeypatch.setattr(Engine, "load", lambda *given: engine)
    made = runpy.run_path(str(ROOT / "space" / "app.py"), run_name="app")
    assert isinstance(made["demo"], gr.Blocks)
    assert made["others"] == ["someone/one", "someone/two"]
    assert [name for name, _ in decorated] == (["answer", "sweep", "look"] if zero_gpu else [])
    assert all(callable(duration) or duration == 10 for _, duration in decorated)


def test_the_space_is_described_and_pinned() -> None:
    _, head, _ = (ROOT / "space" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    found = yaml.safe_load(head)
    assert found["sdk"] == "gradio"
    assert (ROOT / "space" / found["app_file"]).is_file()
    assert len(found["short_description"]) <= 60
    lines = (ROOT / "space" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pins["gradio[mcp]"] == found["sdk_version"] == gr.__version__
    major, minor, *_ = pins["torch"].split(".")
    assert (int(major), int(minor)) <= (2, 11)
