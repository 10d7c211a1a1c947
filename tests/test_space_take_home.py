"""What the Space gives to take home is code that runs, whatever was asked, and does what the page did."""

from __future__ import annotations

import io
import json
import shlex
import subprocess
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
import torch
from space_tools import DIALS, last, saved, tiny_engine
from typer.testing import CliRunner

from neva_hf.cli import app
from neva_hf.space import take_home
from neva_hf.space.engine import Engine
from neva_hf.space.state import from_link

NASTY = "It's \"$(touch x)\" `y` \\ {0}\n'''\n; rm -rf # <b>"
QUESTIONS = ["What now?", NASTY]
each_question = pytest.mark.parametrize("question", QUESTIONS, ids=["plain", "nasty"])


@pytest.fixture(scope="module", params=["chat", "plain"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    # (a space in the path, as people have them)
    _, neuron_map = saved(tmp_path_factory.mktemp("my maps"), request.param == "chat")
    return Engine.load(str(neuron_map), device="cpu")


def answer(engine: Engine, question: str, tokens: int = 10, **options: Any) -> Any:
    return last(engine.stream([], question, DIALS, max_new_tokens=tokens, **options))


def run(code: str) -> str:
    with redirect_stdout(io.StringIO()) as written:
        exec(compile(code, "<take home>", "exec"), {})
    return written.getvalue()


@each_question
def test_the_program_prints_the_edited_answer_of_the_page(engine: Engine, question: str) -> None:
    code = take_home.python(engine, DIALS, question, 3, "https://example.com/", max_new_tokens=10)
    turn = answer(engine, question)
    assert run(code).strip() == turn.edited
    assert turn.edited != turn.base


def test_the_program_gives_the_page_s_answer_of_a_map_with_gains(tmp_path: Path) -> None:
    _, neuron_map = saved(tmp_path, gain=True, units={"power": [0.5, 2.0]})
    gained = Engine.load(str(neuron_map), device="cpu")
    assert (
        run(take_home.python(gained, DIALS, "What now?", 0, max_new_tokens=10)).strip()
        == answer(gained, "What now?").edited
    )


def test_the_program_loads_another_base_model_where_the_page_did(tmp_path: Path) -> None:
    base, neuron_map = saved(tmp_path)
    (tmp_path / "copy").symlink_to(base)
    engine = Engine.load(str(neuron_map), str(tmp_path / "copy"), device="cpu")
    code = take_home.python(engine, DIALS, "What now?", 0, max_new_tokens=10)
    assert f"load_base({str(tmp_path / 'copy')!r})" in code
    assert run(code).strip() == answer(engine, "What now?").edited


def test_the_program_samples_where_the_page_did(engine: Engine) -> None:
    code = take_home.python(engine, DIALS, "What now?", 3, max_new_tokens=10, temperature=0.7)
    assert "torch.manual_seed(3)" in code
    assert "temperature=0.7" in code
    assert run(code) == run(code)


def test_the_program_says_whether_gates_are_used() -> None:
    gated = tiny_engine(gate=True)
    assert "gate=True" in take_home.python(gated, DIALS, "What now?", 0, gate=True)
    assert "gate=False" in take_home.python(gated, DIALS, "What now?", 0)
    assert "gate=" not in take_home.python(tiny_engine(), DIALS, "What now?", 0)


@pytest.mark.parametrize("url", ["https://example.com", "https://a.b/\nimport os\n", "x\"'; import os #"])
def test_an_address_stays_in_its_comment(engine: Engine, url: str) -> None:
    first, second, third, *_ = take_home.python(engine, DIALS, "What now?", 3, url).splitlines()
    assert first == "# pip install neva-hf"
    assert second.startswith("# ")
    assert third == "from neva_hf import NeVAModel"


def test_the_link_in_the_program_brings_the_page_back(engine: Engine) -> None:
    line = take_home.python(engine, DIALS, NASTY, 3, "https://example.com/", temperature=0.5).splitlines()[1]
    found = from_link(dict(parse_qsl(urlsplit(line[2:]).query)), engine.values)
    assert (found.dials, found.question, found.seed, found.temperature) == (DIALS, NASTY, 3, 0.5)


def shell(code: str, *functions: str) -> str:
    """Runs code in a shell in which some commands only print what they were given, a word per line."""
    heads = [name + "() { printf '<%s>\\n' \"$@\" >&2; cat >&2; }\n" for name in functions]
    return subprocess.run(
        ["bash", "-euc", "".join(heads) + code], capture_output=True, check=True, input=b""
    ).stderr.decode()


@each_question
def test_the_command_line_gets_every_word_and_the_question_as_one_line(engine: Engine, question: str) -> None:
    code = take_home.command_line(engine, DIALS, question, 3, max_new_tokens=10, temperature=0.5)
    words = ["chat", engine.source, "--set", "power=-1", "--set", "benevolence=1.5"]
    words += ["--max-new-tokens", "10", "--temperature", "0.5", "--seed", "3"]
    wanted = "".join(f"<{word}>\n" for word in words) + " ".join(question.split()) + "\n"
    assert shell(code, "neva") == wanted


def test_the_command_line_gives_the_edited_answer_of_the_page(engine: Engine) -> None:
    code = take_home.command_line(engine, DIALS, "What now?", 0, max_new_tokens=10)
    words = shlex.split(code.splitlines()[1].partition(" | ")[2])
    done = CliRunner().invoke(app, words[1:], input="What now?\n")
    assert answer(engine, "What now?").edited in done.output


@pytest.mark.parametrize("question", ["", "/quit"])
def test_what_would_be_no_question_on_the_command_line_is_not_put_there(engine: Engine, question: str) -> None:
    assert "printf" not in take_home.command_line(engine, DIALS, question, 0)


@each_question
def test_curl_sends_the_inputs_in_their_order_and_reads_the_answer(engine: Engine, question: str) -> None:
    code = take_home.curl(engine, DIALS, question, 3, "https://example.com/it's/", max_new_tokens=10, temperature=0.5)
    stub = """
curl() {
  if [ "$1" = -sN ]; then echo "then $2" >&2
  else printf '%s\\n' "$2" "$5" "$6" >&2; echo '{"event_id":"abc123"}'; fi
}
"""
    place, flag, body, then = shell(stub + code).splitlines()
    assert place == "https://example.com/it's/gradio_api/call/answer"
    assert flag == "-d"
    assert json.loads(body) == {"data": [question.strip(), DIALS, 3, 10, 0.5, False]}
    assert take_home.API_INPUTS == ("question", "dials", "seed", "max_new_tokens", "temperature", "gate")
    assert then == f"then {place}/abc123"


@pytest.mark.parametrize("gain", [False, True])
def test_the_frozen_adapter_is_made_by_the_command(
    gain: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, neuron_map = saved(tmp_path / "my maps", gain=gain)
    engine = Engine.load(str(neuron_map), device="cpu")
    code = take_home.stock(engine, DIALS, "What now?", 3)
    # What the shell makes of it.
    written = shell(code, "pip", "neva", "python")
    words = [line[1:-1] for line in written.splitlines() if line.startswith("<") and line != "<>"]
    words = words[words.index("export") :]
    assert words[1] == "stock"
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    program = code.partition("<<'END'\n")[2].partition("END")[0]
    scope: dict[str, Any] = {}
    exec(program, scope)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        alone, live = scope["model"](input_ids=ids).logits, engine.model(input_ids=ids, strengths=DIALS).logits
    assert torch.allclose(alone, live, atol=1e-4)


def test_what_cannot_be_frozen_says_why() -> None:
    assert take_home.stock(tiny_engine(), {}, "", 0).startswith("# All dials are at 0")
    assert take_home.stock(tiny_engine(gate=True), DIALS, "", 0).startswith("# This map has gates")


def test_the_page_serves_its_own_map_through_the_api_and_says_so() -> None:
    engine = tiny_engine()
    engine.visiting, engine.source = True, "user/neva-map"
    told = take_home.curl(engine, DIALS, "What now?", 0)
    assert "neva space user/neva-map" in told
    # (the command takes it so)
    words = shlex.split(told.rpartition(": ")[2])
    assert CliRunner().invoke(app, [*words[1:], "--port", "0"]).output.count("--port") == 1
    link = take_home.python(engine, DIALS, "What now?", 0, "https://example.com").splitlines()[1][2:]
    assert from_link(dict(parse_qsl(urlsplit(link).query)), engine.values).map == "user/neva-map"


def test_a_map_that_came_along_is_found_wherever_neva_hf_lies(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engine.source
    monkeypatch.setattr("neva_hf.space.engine.default_map", lambda: Path(folder))
    monkeypatch.setattr("neva_hf.space.maps.default_map", lambda: Path(folder))
    monkeypatch.chdir(tmp_path)
    shipped = Engine.load(device="cpu")
    assert (shipped.shipped, shipped.source) == (True, "map")
    codes = [
        write(shipped, DIALS, "What now?", 0, max_new_tokens=10)
        for write in (take_home.python, take_home.command_line, take_home.stock, take_home.edit_json)
    ]
    assert all(folder not in code for code in codes)
    assert run(codes[0]).strip() == answer(shipped, "What now?").edited
    # A shell asks Python for the folder, and hands it on as one word.
    for code in codes[1:3]:
        asked = f"python() {{ printf '%s\\n' {shlex.quote(folder)}; }}\n"
        assert f"<{folder}>" in shell(asked + code, "pip", "neva").splitlines()


@pytest.mark.parametrize("gain", [False, True])
def test_the_json_holds_the_whole_edit(gain: bool) -> None:
    engine = tiny_engine(gain=gain, units={"power": [0.5, 2.0], "benevolence": [1.0, 0.25]})
    edit = json.loads(take_home.edit_json(engine, DIALS, NASTY, 3, "https://example.com"))
    assert edit["strengths"] == DIALS
    base = engine.base
    handles = []
    for name, numbers in edit["modules"].items():

        def hook(module: Any, inputs: Any, numbers: Any = numbers) -> Any:
            (x,) = inputs
            x = x.clone()
            index = torch.tensor(numbers["index"])
            gained = torch.tensor(numbers["gain"]) * x[..., index] if gain else 0.0
            x[..., index] += torch.tensor(numbers["shift"]) + gained
            return (x,)

        handles.append(base.get_submodule(name).register_forward_pre_hook(hook))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        by_hand = base(input_ids=ids).logits
        for handle in handles:
            handle.remove()
        live, plain = engine.model(input_ids=ids, strengths=DIALS).logits, base(input_ids=ids).logits
    assert torch.allclose(by_hand, live, atol=1e-4)
    assert not torch.allclose(plain, live, atol=1e-2)


def test_the_json_of_dials_at_rest_is_json_too() -> None:
    edit = json.loads(take_home.edit_json(tiny_engine(), {}, "", 0))
    assert edit["modules"] == {}
    assert edit["strengths"] == {}
