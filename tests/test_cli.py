"""The `neva` command: what it writes where, its exit codes, and a chat in which dials are turned."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import typer
from click.testing import Result
from rich.console import Console
from tiny import SCENARIOS, TEXTS, VALUES, random_map, tiny_reader, tiny_tokenizer
from typer.testing import CliRunner

from neva_hf import NeuronMap, NeVAError, NeVAModel, __version__, identify_neurons
from neva_hf import chat as chat_module
from neva_hf.chat import ChatState, chat
from neva_hf.cli import SCORE_NAMES, app
from neva_hf.console import (
    errors_in_one_line,
    layers_table,
    make_console,
    map_summary,
    parse_layers,
    parse_settings,
    printable,
    show_progress,
    values_table,
)
from neva_hf.identify import SCORES, fisher_samples, pipeline
from neva_hf.scenarios import load_scenarios, scenarios_hash
from neva_hf.talk import AnswerOptions, ShownText, answers, stream_answer

NEVA = Path(sysconfig.get_path("scripts")) / "neva"
COMMANDS = [
    "demo",
    "identify",
    "chat",
    "inspect",
    "evaluate",
    "push",
    "pull",
    "card",
    "diff",
    "merge-maps",
    "export",
    "space",
]


@pytest.fixture(autouse=True)
def libraries_as_they_were(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command line quietens libraries for its whole process."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.delenv("NEVA_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    verbosity = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


@pytest.fixture(autouse=True)
def small_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped texts, and as many samples as a real model needs, would take most of the time."""
    monkeypatch.setattr(pipeline, "load_neutral_texts", lambda: TEXTS)
    monkeypatch.setattr(
        pipeline, "fisher_samples", lambda *given, **named: fisher_samples(*given, **{**named, "samples": 64})
    )


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_reader().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def found(model_folder: Path) -> NeuronMap:
    model = tiny_reader()
    model.name_or_path = str(model_folder)
    return identify_neurons(model, tiny_tokenizer(), SCENARIOS, neurons=8, leakage_penalty=0, neutral_texts=TEXTS)


@pytest.fixture(scope="module")
def map_folder(found: NeuronMap, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return found.save_pretrained(tmp_path_factory.mktemp("map"))


@pytest.fixture
def scenario_file(tmp_path: Path) -> Path:
    lines = [json.dumps({"question": one.question, "replies": dict(one.replies)}) for one in SCENARIOS]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(lines))
    return path


def neva(*arguments: object, said: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=said)


def assert_refused(result: Result, *says: str) -> None:
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    for part in says:
        assert part in line


# Help, version, wrong options


def test_help_names_every_command_and_every_command_has_its_own() -> None:
    general = neva("--help")
    assert general.exit_code == 0
    for command in COMMANDS:
        assert f" {command} " in general.stdout
        own = neva(command, "--help")
        assert own.exit_code == 0
        assert "--help" in own.stdout
    assert sorted(typer.main.get_command(app).commands) == sorted(COMMANDS)  # type: ignore[attr-defined]


def test_every_option_and_argument_is_explained() -> None:
    group = typer.main.get_command(app)
    for command in COMMANDS:
        for parameter in group.commands[command].params:  # type: ignore[attr-defined]
            assert getattr(parameter, "help", None), (command, parameter.name)


def test_no_command_at_all_shows_the_help() -> None:
    assert "Usage: neva" in neva().output


def test_version_is_that_of_the_package() -> None:
    result = neva("--version")
    assert (result.exit_code, result.stdout) == (0, f"neva-hf {__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--colour"],
        ["sing"],
        ["inspect"],
        ["inspect", "a", "b"],
        ["identify", "out", "--neurons", "many"],
        ["identify", "out", "--neurons", "0"],
        ["identify", "out", "--limit", "0"],
        ["chat", "map", "--max-new-tokens", "0"],
        ["chat", "map", "--temperature", "-1"],
    ],
    ids=" ".join,
)
def test_a_wrong_option_ends_with_2_and_nothing_on_standard_output(arguments: list[str]) -> None:
    result = neva(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


# identify


def test_identify_saves_a_map_that_loads_and_says_where(
    model_folder: Path, scenario_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a" / "map"
    settings = ["--base", model_folder, "--scenarios", scenario_file, "--neurons", 6, "--values", "power, security"]
    result = neva("identify", out, *settings, "--target-kl", 0.1)
    assert result.exit_code == 0, result.output
    assert str(out) in result.stdout
    neuron_map = NeuronMap.from_pretrained(out)
    assert neuron_map.values == ["power", "security"]
    assert all(sum(counts.values()) == 6 for counts in neuron_map.neuron_counts().values())
    assert neuron_map.base_model == str(model_folder)
    assert neuron_map.config.provenance["scenarios_sha256"] == scenarios_hash(SCENARIOS)
    assert neuron_map.config.value_system is None
    for sides in neuron_map.config.measurements["calibration"].values():
        assert [side["kl"] for side in sides.values()] == pytest.approx([0.1, 0.1], rel=0.08)
    assert NeVAModel.from_pretrained(out).values == ["power", "security"]


def test_identify_with_json_writes_one_document_and_words_elsewhere(
    model_folder: Path, scenario_file: Path, tmp_path: Path
) -> None:
    settings = ["--base", model_folder, "--scenarios", scenario_file, "--neurons", 3, "--limit", 1]
    result = neva("identify", tmp_path / "map", *settings, "--value-system", "schwartz10", "--json")
    assert result.exit_code == 0, result.output
    neuron_map = NeuronMap.from_pretrained(tmp_path / "map")
    assert json.loads(result.stdout) == json.loads(json.dumps(map_summary(neuron_map)))
    assert neuron_map.config.provenance["scenarios"] == 1
    assert neuron_map.config.value_system is not None
    assert "scenarios: 1" in result.stderr


def test_identify_replaces_a_map_only_when_told_to(
    found: NeuronMap, model_folder: Path, scenario_file: Path, tmp_path: Path
) -> None:
    out = found.save_pretrained(tmp_path / "map")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    settings = [out, "--base", model_folder, "--scenarios", scenario_file, "--neurons", 3, "--values", "power"]
    assert_refused(neva("identify", *settings), "There is an adapter in", "--overwrite")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert neva("identify", *settings, "--overwrite").exit_code == 0
    assert NeuronMap.from_pretrained(out).values == ["power"]


def test_identify_refuses_in_one_line_and_leaves_nothing_behind(
    model_folder: Path, scenario_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "map"
    base = ["--base", model_folder]
    mine = ["--scenarios", scenario_file]
    (tmp_path / "bad.jsonl").write_text('{"question": "Why?", "replies": {"power": "yes"}}\n')
    (tmp_path / "file").write_text("")
    nowhere = tmp_path / ("a-very-long-name-of-a-folder" * 4)
    refused: list[tuple[list[object], str]] = [
        ([out, *base, "--scenarios", tmp_path / "bad.jsonl"], "bad.jsonl, line 1: `replies` must hold at least two"),
        ([out, *base, "--scenarios", nowhere], f"There are no scenarios at '{nowhere}'"),
        ([out, *base, *mine, "--neurons", 8, "--values", "power,hedonism"], "No scenario contrasts hedonism"),
        ([out, *base, *mine, "--values", ","], "`values` must hold 1 to 256 names"),
        ([out, *base, *mine, "--score", "magic"], "There is no score 'magic': choose one of attribution, gradient"),
        ([out, *base, *mine, "--score", "probe", "--leakage-penalty", 0.5], "Drop one of the two"),
        ([out, *base, *mine, "--dtype", "float"], "There is no type 'float' to compute in"),
        ([out, *base, *mine, "--layers", "1-x"], "'1-x' names no layers"),
        ([out, *base, *mine, "--layers", "0-2"], "`layers` must be numbers from 0 to 1"),
        ([out, *base, *mine, "--checkpoint", tmp_path / "file"], "is a file; name a folder for the checkpoints"),
        ([out, *base, *mine, "--neurons", 1000], "`neurons` must be 1 to 128"),
        ([out, *base, *mine, "--target-kl", 0], "`target_kl` must be between 0 and 5"),
        ([out, *base, *mine, "--value-system", "schwartz11"], "schwartz11"),
        ([out, *base, *mine, "--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
        ([out, *mine, "--base", nowhere], f"There is no folder or file '{nowhere}'"),
        ([tmp_path / "file", *base, *mine], "is a file; name a folder"),
    ]
    for arguments, says in refused:
        result = neva("identify", *arguments, "--json")
        assert result.exit_code == 1, arguments
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        assert says in line
        assert result.stderr.splitlines()[-1] == line
        assert result.stdout == ""
        assert not out.exists()


def test_the_scores_that_can_be_named_are_all_there_are_and_the_help_lists_them() -> None:
    assert set(SCORE_NAMES) == set(SCORES)
    (score,) = [
        option
        for option in typer.main.get_command(app).commands["identify"].params  # type: ignore[attr-defined]
        if option.name == "score"
    ]
    assert all(name in score.help for name in SCORES)


@pytest.mark.parametrize(
    ("options", "penalty", "score"),
    [
        ([], 1.0, "balanced"),
        (["--leakage-penalty", 2], 2.0, "balanced"),
        (["--leakage-penalty", 0], 0.0, "attribution"),
        (["--score", "contrast"], 0.0, "contrast"),
        (["--score", "probe", "--leakage-penalty", 0], 0.0, "probe"),
    ],
)
def test_a_score_chooses_neurons_where_leakage_costs_nothing(
    options: list[object], penalty: float, score: str, model_folder: Path, scenario_file: Path, tmp_path: Path
) -> None:
    settings = ["--base", model_folder, "--scenarios", scenario_file, "--neurons", 3, *options]
    result = neva("identify", tmp_path / "map", *settings)
    assert result.exit_code == 0, result.output
    provenance = NeuronMap.from_pretrained(tmp_path / "map").config.provenance
    assert (provenance["leakage_penalty"], provenance["score"]) == (penalty, score)


def test_gates_layers_and_dtype_reach_the_map(model_folder: Path, scenario_file: Path, tmp_path: Path) -> None:
    settings = ["--base", model_folder, "--scenarios", scenario_file, "--neurons", 3, "--leakage-penalty", 0]
    result = neva("identify", tmp_path / "map", *settings, "--gates", "--layers", "1", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    neuron_map = NeuronMap.from_pretrained(tmp_path / "map")
    assert neuron_map.config.use_gate
    assert neuron_map.config.provenance["layers"] == [1]
    assert [name for name in neuron_map.modules if ".layers.1." not in name] == []


def test_dose_curves_are_measured_on_scenarios_spread_over_the_dev_split(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(
        "neva_hf.identify.identify_neurons",
        lambda *_, dose_scenarios, **__: asked.append([one.id for one in dose_scenarios]) or random_map(tiny_reader()),
    )
    for number, options in enumerate(([], ["--dose", 1], ["--dose", 0], ["--dose", 1000])):
        assert neva("identify", tmp_path / str(number), "--base", model_folder, *options).exit_code == 0
    dev = [one.id for one in load_scenarios("schwartz", "dev")]
    assert [dev.index(name) for name in asked[0]] == [0, 9, 18, 27]
    assert asked[1:] == [[dev[0]], [], dev]


def test_the_dev_split_lies_beside_the_training_split(model_folder: Path, scenario_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    lines = scenario_file.read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join(lines))
    (folder / "dev.jsonl").write_text(lines[0])
    settings = ["--base", model_folder, "--neurons", 3, "--leakage-penalty", 0]
    for name, source in (("a", folder), ("b", folder / "train.jsonl")):
        result = neva("identify", tmp_path / name, *settings, "--scenarios", source)
        assert result.exit_code == 0, result.output
        dose = NeuronMap.from_pretrained(tmp_path / name).config.measurements["dose"]
        assert (dose["scenarios"], sorted(dose["curves"])) == (1, sorted(VALUES))


@pytest.mark.parametrize(
    ("dev", "says"),
    [
        (None, "No dose curves: these scenarios have no dev split (dev.jsonl beside train.jsonl)."),
        (2, "No dose curves: the dev split, or this part of it, does not contrast benevolence."),
    ],
)
def test_without_scenarios_for_them_there_are_no_dose_curves_and_one_line_says_so(
    dev: int | None, says: str, model_folder: Path, scenario_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    lines = scenario_file.read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join(lines))
    if dev is not None:
        (folder / "dev.jsonl").write_text(lines[dev])
    settings = ["--base", model_folder, "--neurons", 3, "--leakage-penalty", 0, "--scenarios", folder]
    result = neva("identify", tmp_path / "map", *settings)
    assert result.exit_code == 0, result.output
    assert [line for line in result.stdout.splitlines() if "dose" in line] == [says]
    assert "dose" not in NeuronMap.from_pretrained(tmp_path / "map").config.measurements


class Killed(BaseException):
    """What nothing on the way expects."""


@pytest.mark.parametrize("named", [False, True], ids=["default", "named"])
def test_a_search_that_was_killed_goes_on_when_the_same_command_is_given_again(
    named: bool, model_folder: Path, scenario_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, kept = tmp_path / "map", tmp_path / "kept"
    settings = ["--base", model_folder, "--scenarios", scenario_file, "--neurons", 3]
    whole = tmp_path / "whole"
    assert neva("identify", whole, *settings).exit_code == 0
    assert not (whole / ".identify").exists()

    seen: list[tuple[str, int]] = []

    def progress(_: Any) -> Any:
        def loop(items: Any, what: str) -> Iterator[Any]:
            seen.append((what, len(items)))
            if what == "selection" and len(seen) < 4:
                raise Killed
            yield from items

        return loop

    monkeypatch.setattr("neva_hf.console.show_progress", progress)
    settings += ["--checkpoint", kept] if named else []
    with pytest.raises(Killed):
        CliRunner().invoke(app, [str(part) for part in ("identify", out, *settings)], catch_exceptions=False)
    folder = kept if named else out / ".identify"
    assert any(folder.iterdir())
    assert not (out / "adapter_config.json").exists()
    first = dict(seen)
    assert first["scenarios"] == len(SCENARIOS)
    seen[:] = [("", 0)] * 4
    assert neva("identify", out, *settings).exit_code == 0
    # What was done is not done again.
    assert dict(seen)["sensitivity"] == 0
    assert folder.exists() == named
    one, other = NeuronMap.from_pretrained(whole), NeuronMap.from_pretrained(out)
    for name, edits in one.modules.items():
        assert torch.equal(edits.index, other.modules[name].index)
        assert torch.equal(edits.shift, other.modules[name].shift)


def test_two_processes_make_one_map_and_one_of_them_talks(
    model_folder: Path, scenario_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "map"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "neva_hf.cli", "identify"]
    settings = [out, "--base", model_folder, "--scenarios", scenario_file, "--neurons", 3, "--leakage-penalty", 0]
    done = subprocess.run([*launch, *map(str, settings), "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["values"].keys() == set(VALUES)
    assert done.stderr.count("No dose curves") == done.stderr.count("Saved to") == 1
    assert done.stderr.count("scenarios: 2 ...") == 1
    assert sorted(NeuronMap.from_pretrained(out).values) == sorted(VALUES)
    assert not (out / ".identify").exists()


# inspect


def test_inspect_shows_values_layers_and_provenance(found: NeuronMap, map_folder: Path) -> None:
    result = neva("inspect", map_folder)
    assert result.exit_code == 0
    assert result.stderr == ""
    for part in (*found.values, *found.modules, found.base_model, found.config.provenance["scenarios_sha256"]):
        assert str(part) in result.stdout.replace("\n", "")


def test_inspect_counts_neurons_with_a_gain_alone_and_says_that_there_are_gains(
    map_folder: Path, tmp_path: Path
) -> None:
    neuron_map = random_map(tiny_reader(), gain=True)
    for edits in neuron_map.modules.values():
        edits.shift[:, :3] = 0
    assert [list(column.cells) for column in values_table(neuron_map).columns[1:3]] == [["12"] * 3, ["2"] * 3]
    result = neva("inspect", neuron_map.save_pretrained(tmp_path))
    assert "With gains: an edit adds a shift and a multiple of the neuron's own activation." in result.stdout
    assert "With gains" not in neva("inspect", map_folder).stdout


def test_inspect_with_json_is_one_document_with_every_count_unit_and_range(found: NeuronMap, map_folder: Path) -> None:
    result = neva("inspect", map_folder, "--json")
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert list(told["values"]) == found.values
    for value, part in told["values"].items():
        assert part["neurons"] == 8 == sum(part["neurons_per_module"].values())
        assert part["neurons_per_module"] == found.neuron_counts()[value]
        assert part["range"] == found.config.ranges[value]
        assert part["units"] == found.config.units[value]
    assert told["base_model"] == found.base_model
    assert told["measurements"] == found.config.measurements
    assert told["provenance"] == found.config.provenance


def test_the_table_of_values_has_their_numbers(found: NeuronMap) -> None:
    table = values_table(found)
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == found.values
    assert [int(cell) for cell in columns[1]] == [8] * 3
    ranges = [found.config.ranges[value] for value in found.values]
    assert [[float(low), float(high)] for low, high in zip(columns[3], columns[4], strict=True)] == ranges
    assert [float(cell) for cell in columns[5] + columns[6]] == pytest.approx([0.05] * 6, abs=0.005)
    layers = layers_table(found)
    sizes = [edits.index.numel() for edits in found.modules.values()]
    assert [int(cell) for cell in layers.columns[1].cells] == sizes


@pytest.mark.parametrize(
    "measurements", [{}, {"calibration": 1}, {"calibration": {"power": [1]}}, {"calibration": {"power": {"-1": {}}}}]
)
def test_a_map_with_other_measurements_can_still_be_looked_at(measurements: dict[str, Any], tmp_path: Path) -> None:
    neuron_map = random_map(tiny_reader(), measurements=measurements)
    result = neva("inspect", neuron_map.save_pretrained(tmp_path))
    assert result.exit_code == 0
    table = values_table(neuron_map)
    assert [list(column.cells) for column in table.columns[3:]] == [["?"] * 3] * 4


def test_what_a_stranger_wrote_into_a_map_does_not_reach_the_terminal_as_commands(tmp_path: Path) -> None:
    evil = "\x1b[2J\x07\u202e[bold red]x"
    provenance = {"method": evil, evil: 1}
    neuron_map = random_map(tiny_reader(), provenance=provenance, base_model_name_or_path=evil)
    result = neva("inspect", neuron_map.save_pretrained(tmp_path))
    assert result.exit_code == 0
    assert result.stdout.count("?[2J??[bold red]x") == 3
    assert not set(result.stdout) & {"\x1b", "\x07", "\u202e"}
    assert printable("übergrößen 価値 a b") == "übergrößen 価値 a b"


def test_a_missing_or_damaged_map_is_refused_in_one_line(map_folder: Path, tmp_path: Path) -> None:
    empty, nowhere = tmp_path / "empty", tmp_path / ("not-there-" * 15)
    empty.mkdir()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in map_folder.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes()[:200])
    for command in ("inspect", "chat"):
        assert_refused(neva(command, nowhere), "There is no folder", str(nowhere))
        assert_refused(neva(command, empty), "adapter_config.json is missing")
        assert_refused(neva(command, damaged), "adapter_config.json is not valid JSON")


# chat, from outside


def test_a_chat_through_a_pipe_goes_to_the_end_of_its_input(map_folder: Path) -> None:
    for said in ("Why?\n/set power 1.5\nWhy?\n/values\n/compare\n/reset\n/quit\nnever read\n", "Why?\n", "Why?", ""):
        result = neva("chat", map_folder, "--max-new-tokens", 4, said=said)
        assert result.exit_code == 0, result.output
        assert result.stderr == ""
    assert "never read" not in result.stdout


def test_a_slip_in_a_chat_is_told_and_the_chat_goes_on(map_folder: Path) -> None:
    result = neva(
        "chat", map_folder, "--max-new-tokens", 2, said="/set powr 1\n/set power much\n/sett\n/set power 1\n"
    )
    assert result.exit_code == 0
    assert "did you mean 'power'?" in result.stdout
    assert "power +1" in result.stdout.splitlines()[-1]


def test_dials_can_be_set_on_the_command_line_and_are_checked_before_a_model_is_loaded(
    map_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["--set", "power=1.5", "--set", "security=-1"]
    result = neva("chat", map_folder, *settings, said="/compare Why?\n")
    assert result.exit_code == 0, result.output
    assert "power +1.5, security -1" in result.stdout
    monkeypatch.setattr(NeVAModel, "from_pretrained", None)
    monkeypatch.setattr("neva_hf.base.load_base", None)
    for base in ([], ["--base", "no/matter"]):
        assert_refused(neva("chat", map_folder, *base, "--set", "powr=1"), "did you mean 'power'?")
        assert_refused(neva("chat", map_folder, *base, "--set", "power"), "write VALUE=NUMBER")
        assert_refused(neva("chat", map_folder, *base, "--set", "power=nan"), "must be finite")


def test_a_chat_can_bring_another_base_model(map_folder: Path, model_folder: Path, tmp_path: Path) -> None:
    result = neva("chat", map_folder, "--base", model_folder, "--max-new-tokens", 2, said="Why?\n")
    assert result.exit_code == 0
    nowhere = tmp_path / "nowhere"
    assert_refused(neva("chat", map_folder, "--base", nowhere), f"There is no folder or file '{nowhere}'")
    tiny_reader(intermediate_size=48).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    assert_refused(neva("chat", map_folder, "--base", tmp_path / "other"), "made for another model", "48")


def test_a_strength_outside_its_range_is_warned_about_in_one_line(map_folder: Path, found: NeuronMap) -> None:
    strength = found.config.ranges["power"][1] + 1
    with pytest.warns(UserWarning, match="outside the range in which this map is known to stay fluent"):
        result = neva("chat", map_folder, said=f"/set power {strength}\n")
    assert result.exit_code == 0
    assert warnings.formatwarning("So it is.", UserWarning, "file.py", 1) == "Warning: So it is.\n"


# Real processes


def process(*arguments: object) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    # Under nohup or in the background SIGINT is ignored, and a child would inherit that.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [NEVA, *map(str, arguments)]
    return subprocess.Popen(command, text=True, bufsize=1, encoding="utf-8", preexec_fn=heard, **pipes)


def test_a_process_that_is_refused_exits_with_1_and_one_line_and_no_traceback(tmp_path: Path) -> None:
    with process("inspect", tmp_path / "nowhere", "--json") as running:
        out, err = running.communicate()
    assert running.returncode == 1
    assert out == ""
    assert err.count("Error: ") == 1
    assert err.splitlines()[-1].startswith("Error: There is no folder")
    assert "Traceback" not in err


def test_a_process_with_a_wrong_option_exits_with_2() -> None:
    with process("inspect", "--colour") as running:
        out, err = running.communicate()
    assert (running.returncode, out) == (2, "")
    assert "Traceback" not in err


def test_a_chat_process_that_is_interrupted_at_the_prompt_exits_with_130(map_folder: Path) -> None:
    with process("chat", map_folder, "--max-new-tokens", 2) as running:
        assert running.stdout is not None
        # Once the commands are listed, a line is waited for.
        assert any("/quit" in line for line in iter(running.stdout.readline, ""))
        running.send_signal(signal.SIGINT)
        out, err = running.communicate()
    assert running.returncode == 130
    assert err.splitlines()[-1] == "Interrupted."
    assert "Traceback" not in out + err


# chat, from inside


class Script:
    """What a person types: lines, and exceptions that reading raises."""

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self.lines = iter(lines)

    def __call__(self) -> str:
        line = next(self.lines, EOFError)
        if isinstance(line, str):
            return line + "\n"
        raise line


@pytest.fixture(scope="module")
def model(found: NeuronMap) -> NeVAModel:
    return found.apply_to(tiny_reader())


def talk(model: NeVAModel, *lines: str | type[BaseException], **options: Any) -> tuple[ChatState, str]:
    console = Console(file=io.StringIO(), width=200, highlight=False)
    strengths = options.pop("strengths", None)
    made = AnswerOptions(**{"max_new_tokens": 5, **options})
    tokenizer = tiny_tokenizer(pad_token="<|end|>")
    state = chat(console, model, tokenizer, Script(*lines), strengths=strengths, options=made)
    assert isinstance(console.file, io.StringIO)
    return state, console.file.getvalue()


def answer(model: NeVAModel, question: str, strengths: dict[str, float], **options: Any) -> str:
    history = options.pop("history", ())
    made = AnswerOptions(**{"max_new_tokens": 5, **options})
    tokenizer = tiny_tokenizer(pad_token="<|end|>")
    (text,) = answers(model, tokenizer, question, [strengths], history=history, options=made)
    return text


def test_every_answer_is_that_of_the_dials_and_of_what_was_said_before(model: NeVAModel) -> None:
    state, _ = talk(model, "Why?", "/set power 3", "And now?", "/set security=-2", "  So?  ")
    first = answer(model, "Why?", {})
    second = answer(model, "And now?", {"power": 3.0}, history=[("Why?", first)])
    history = [("Why?", first), ("And now?", second)]
    third = answer(model, "So?", {"power": 3.0, "security": -2.0}, history=history)
    assert state.history == [*history, ("So?", third)]
    assert second != answer(model, "And now?", {}, history=[("Why?", first)])
    assert state.strengths == {"power": 3.0, "security": -2.0}
    assert model.get_strengths() == dict.fromkeys(model.values, 0.0)


def test_dials_are_turned_back_by_zero_and_by_reset(model: NeVAModel) -> None:
    assert talk(model, "/set power 1", "/set power 2", "/set security -1", "/set power 0")[0].strengths == {
        "security": -1.0
    }
    assert talk(model, "/set power 1", "/reset")[0].strengths == {}
    assert talk(model, "/quit", strengths={"power": 1.5, "security": 0})[0].strengths == {"power": 1.5}


@pytest.mark.parametrize("end", ["/quit", "/exit", EOFError])
def test_a_chat_ends_when_asked_to_and_with_its_input(model: NeVAModel, end: Any) -> None:
    state, _ = talk(model, "/set power 1", "", "   ", end, "/set power 2")
    assert state == ChatState(strengths={"power": 1.0})


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/set powr 1", "This map has no value 'powr' (did you mean 'power'?)"),
        ("/set power", "Write /set VALUE NUMBER, such as /set power 1.5 (got 'power')."),
        ("/set", "Write /set VALUE NUMBER"),
        ("/set power high", "Write /set VALUE NUMBER"),
        ("/set power 1 2", "Write /set VALUE NUMBER"),
        ("/set power nan", "The strength of 'power' must be finite"),
        ("/set power inf", "The strength of 'power' must be finite"),
        ("/compare", "There is no question to compare yet"),
        ("/stop", "There is no command '/stop'; /help lists them."),
        ("/", "There is no command '/'"),
    ],
)
def test_a_slip_is_explained_and_changes_nothing(model: NeVAModel, line: str, says: str) -> None:
    state, shown = talk(model, "/set security 1", line)
    assert says in shown
    assert state == ChatState(strengths={"security": 1.0})


def test_help_names_every_command(model: NeVAModel) -> None:
    _, shown = talk(model, "/help")
    for command in ("/set", "/values", "/reset", "/compare", "/clear", "/help", "/quit"):
        assert shown.count(f"  {command}") == 2


def test_values_shows_every_dial_its_setting_and_its_range(model: NeVAModel, found: NeuronMap) -> None:
    _, shown = talk(model, "/set power 1.25", "/values")
    rows = [line.split() for line in shown.splitlines() if "fluent from" in line]
    assert [row[0] for row in rows] == found.values
    assert [float(row[1]) for row in rows] == [1.25 if value == "power" else 0 for value in found.values]
    assert [[float(row[4]), float(row[6])] for row in rows] == [found.config.ranges[value] for value in found.values]


def test_compare_shows_the_base_model_beside_the_dials_and_changes_nothing(
    model: NeVAModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[Any], list[Any]]] = []

    def note(*args: Any, history: Any = (), **options: Any) -> list[str]:
        asked.append((args[2], list(args[3]), list(history)))
        return answers(*args, history=history, **options)

    monkeypatch.setattr(chat_module, "answers", note)
    state, shown = talk(model, "Why?", "/set power 3", "So?", "/compare", "/compare And then?")
    assert [question for question, _ in state.history] == ["Why?", "So?"]
    assert state.last_question == "So?"
    assert asked == [
        ("So?", [{}, {"power": 3.0}], state.history[:1]),
        ("And then?", [{}, {"power": 3.0}], state.history),
    ]
    base, edited = (answer(model, "So?", dials, history=state.history[:1]) for dials in ({}, {"power": 3.0}))
    assert base != edited == state.history[1][1]
    assert [shown.splitlines().count(title) for title in ("base model", "power +3")] == [2, 3]


def test_clear_forgets_what_was_said_and_keeps_the_dials(model: NeVAModel) -> None:
    state, _ = talk(model, "/set power 1", "Why?", "/clear", "Why?")
    assert state.history == [("Why?", answer(model, "Why?", {"power": 1.0}))]


def test_an_interrupt_stops_the_answer_and_not_the_chat(model: NeVAModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopping(*args: Any, **options: Any) -> str:
        if args[2] == "Long?":
            raise KeyboardInterrupt
        return stream_answer(*args, **options)

    seen: list[Any] = []
    monkeypatch.setattr(chat_module, "stream_answer", stopping)
    monkeypatch.setattr(chat_module, "answers", lambda *args, history, **_: seen.append(list(history)) or ["a", "b"])
    state, shown = talk(model, "Why?", "Long?", "/compare", "So?")
    assert "(stopped)" in shown
    assert [question for question, _ in state.history] == ["Why?", "So?"]
    # The question without an answer is compared behind all that was answered before it.
    assert seen == [state.history[:1]]


def test_an_interrupt_at_the_prompt_ends_the_chat(model: NeVAModel) -> None:
    with pytest.raises(KeyboardInterrupt):
        talk(model, "/set power 1", KeyboardInterrupt)


@pytest.mark.parametrize("strengths", [{"powr": 1.0}, {"powr": 0.0}, {"power": float("nan")}])
def test_dials_to_begin_with_are_checked(model: NeVAModel, strengths: dict[str, float]) -> None:
    with pytest.raises(NeVAError, match="pow"):
        talk(model, strengths=strengths)


def test_sampled_answers_depend_on_the_seed_and_leave_the_callers_random_numbers_alone(model: NeVAModel) -> None:
    before = torch.get_rng_state()
    sampled = [answer(model, "Why?", {}, temperature=1.5, seed=seed, max_new_tokens=12) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert sampled[0] == sampled[1] != sampled[2]
    assert talk(model, "Why?", temperature=1.5, seed=1, max_new_tokens=12)[0].history == [("Why?", sampled[0])]


def test_greedy_answers_are_greedy_whatever_the_models_own_settings_are(model: NeVAModel) -> None:
    wanted = answer(model, "Why?", {}, max_new_tokens=12)
    own = model.get_base_model().generation_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own, "do_sample", True)
        patch.setattr(own, "temperature", 5.0)
        assert answer(model, "Why?", {}, max_new_tokens=12) == wanted


def test_answers_side_by_side_are_those_that_each_setting_gives_alone(model: NeVAModel) -> None:
    settings: list[dict[str, float]] = [{}, {"power": 3.0}, {"security": -3.0}]
    tokenizer = tiny_tokenizer(pad_token="<|end|>")
    together = answers(model, tokenizer, "Why?", settings, options=AnswerOptions(max_new_tokens=8))
    assert together == [answer(model, "Why?", setting, max_new_tokens=8) for setting in settings]
    assert len(set(together)) == 3


# Models without a chat template


def script(base: torch.nn.Module, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a model write one text per row, whatever it is asked."""
    tokenizer = tiny_tokenizer()
    ids = [tokenizer(text)["input_ids"] for text in texts]
    real, steps = base.forward, iter(range(10_000))

    def forward(*args: Any, **kwargs: Any) -> Any:
        output, step = real(*args, **kwargs), next(steps)
        for row, tokens in enumerate(ids):
            output.logits[row, -1] = 0.0
            output.logits[row, -1, tokens[step] if step < len(tokens) else tokenizer.eos_token_id] = 50.0
        return output

    monkeypatch.setattr(base, "forward", forward)


RUN_ON = "Rest.\n\nQuestion: And then? Question"


def test_an_answer_ends_where_a_model_without_a_chat_template_asks_the_next_question(
    found: NeuronMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer(pad_token="<|end|>")
    options = AnswerOptions(max_new_tokens=60)
    base = tiny_reader()
    model = found.apply_to(base)
    script(base, [RUN_ON, "A question: Question what is\nQuestionable."], monkeypatch)
    made = answers(model, tokenizer, "Why?", [{}, {}], options=options)
    assert made[0] == "Rest."
    assert made[1].startswith("A question: Question what is\nQuestionable.")

    base = tiny_reader()
    model = found.apply_to(base)
    script(base, [RUN_ON], monkeypatch)
    pieces: list[str] = []
    assert stream_answer(model, tokenizer, "Why?", {}, pieces.append, options=options) == "Rest."
    assert "".join(pieces).rstrip() == "Rest."


def test_a_model_with_a_chat_template_may_write_the_word_question(
    found: NeuronMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer(pad_token="<|end|>")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    base = tiny_reader()
    model = found.apply_to(base)
    script(base, [RUN_ON], monkeypatch)
    (made,) = answers(model, tokenizer, "Why?", [{}], options=AnswerOptions(max_new_tokens=len(RUN_ON)))
    assert made.startswith(RUN_ON[:30])


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["Yes.\nQues", "tion:\nWhat"], "Yes."),
        (["Yes.\n", "\nQuestion", ": So"], "Yes.\n"),
        (["Yes.\nQues", "ts are fun.\n", "Q"], "Yes.\nQuests are fun.\nQ"),
        (["Yes.\nQuestion"], "Yes.\nQuestion"),
        (["\nQuestion:", "more"], ""),
    ],
)
def test_what_may_begin_a_stop_string_is_held_back_until_it_is_known(pieces: list[str], shown: str) -> None:
    written: list[str] = []
    text = ShownText(written.append, "\nQuestion:")
    for number, piece in enumerate(pieces, start=1):
        text.add(piece, last=number == len(pieces))
        assert shown.startswith("".join(written))
    assert text.text == "".join(written) == shown


# The console


def test_layers_are_read_as_numbers_and_ranges() -> None:
    assert parse_layers("6-8") == [6, 7, 8]
    assert parse_layers(" 3, 1 ,2-4,4") == [1, 2, 3, 4]
    for wrong in ("", "a", "1,", "3-1", "-1", "1-", "1.5", "1-2-3"):
        with pytest.raises(NeVAError, match="names no layers: write numbers, such as 6-28"):
            parse_layers(wrong)


def test_settings_are_read_as_names_and_numbers() -> None:
    assert parse_settings(["power=1.5", " security = -1", "power=2"]) == {"power": 2.0, "security": -1.0}
    for wrong in ("power", "power=", "power=high", "power 1"):
        with pytest.raises(NeVAError, match=r"write VALUE=NUMBER, such as benevolence=1\.5"):
            parse_settings([wrong])


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_passes_every_item_on(terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal)
    progress = show_progress(console)
    assert list(progress([1, 2, 3], "numbers")) == [1, 2, 3]
    assert list(progress(iter([1, 2]), "a stream")) == [1, 2]


def ended(error: BaseException | None) -> tuple[int | None, str]:
    console = Console(file=io.StringIO(), width=40)
    code: int | None = None
    try:
        with errors_in_one_line(console):
            if error is not None:
                raise error
    except SystemExit as left:
        code = left.code  # type: ignore[assignment]
    assert isinstance(console.file, io.StringIO)
    return code, console.file.getvalue()


def test_errors_are_one_line_however_long_and_strange_they_are() -> None:
    assert ended(None) == (None, "")
    long = "a [bold]path[/] \n" * 20
    assert ended(NeVAError(long)) == (1, "Error: " + " ".join(long.split()) + "\n")
    code, shown = ended(ZeroDivisionError("division\nby zero"))
    assert code == 1
    assert shown.count("\n") == 1
    assert shown.startswith("Error: ZeroDivisionError: division (")
    assert ended(KeyboardInterrupt())[0] == 130
    assert ended(SystemExit(7)) == (7, "")


@pytest.mark.parametrize("error", [NeVAError("no"), ZeroDivisionError("no")])
def test_a_developer_can_ask_for_the_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEVA_DEBUG", "1")
    with pytest.raises(type(error)):
        ended(error)


@pytest.mark.parametrize("error", [typer.Exit(3), BrokenPipeError()])
def test_what_others_handle_is_passed_on(error: Exception) -> None:
    with pytest.raises(type(error)):
        ended(error)


def test_words_go_to_standard_error_when_standard_output_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    for json_output in (False, True):
        make_console(json_output).print("said")
        assert tuple(capsys.readouterr()) == (("", "said\n") if json_output else ("said\n", ""))


def test_a_summary_can_be_written_as_json_with_ranges_and_without(found: NeuronMap) -> None:
    bare = NeuronMap(replace(found.config, ranges={}, units={}), found.modules)
    for neuron_map in (found, bare):
        assert json.loads(json.dumps(map_summary(neuron_map)))["base_model"] == found.base_model
    assert all(part["range"] is None for part in map_summary(bare)["values"].values())
    assert set(found.values) == set(VALUES)
