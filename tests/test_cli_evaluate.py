"""`neva evaluate`: what it writes where, that it goes on where it was, several processes, and errors in one line."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from click.testing import Result
from tiny import SCENARIOS, TEXTS, VALUES, random_map, tiny_reader, tiny_tokenizer
from typer.testing import CliRunner

from neva_hf.cli import app
from neva_hf.evaluation import job, kept


@pytest.fixture(autouse=True)
def libraries_as_they_were(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command line quietens libraries for its whole process."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.delenv("NEVA_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    verbosity = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, a map of it, and scenarios."""
    folder = tmp_path_factory.mktemp("made")
    base = tiny_reader()
    base.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    random_map(base, base_model_name_or_path=str(folder / "base")).save_pretrained(folder / "map")
    lines = [json.dumps({"question": one.question, "replies": dict(one.replies)}) for one in SCENARIOS]
    (folder / "scenarios").mkdir()
    for split in ("train", "dev", "test"):
        (folder / "scenarios" / f"{split}.jsonl").write_text("\n".join(lines))
    (folder / "single.jsonl").write_text("\n".join(lines[2:]))
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(job, "load_neutral_texts", lambda split, limit=None: TEXTS[:limit])

    def neva(folder: str, *more: object, **given: object) -> Result:
        arguments = {"map": made / "map", "scenarios": made / "scenarios", **given}
        options = ["--scenarios", arguments["scenarios"], "--output", tmp_path / folder, "--no-pictures", *more]
        return CliRunner().invoke(app, ["evaluate", str(arguments["map"]), *map(str, options)])

    return neva


def refused(result: Result) -> str:
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    return line


def test_a_report_is_written_and_shown(run: Any, tmp_path: Path) -> None:
    result = run("out", "--few", 2, "--pairs", "1", "--limit", 2)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["methods"]) == ["NeVA"]
    assert report["scenarios"] | {"sha256": ""} == {
        "set": "scenarios",
        "split": "test",
        "count": 2,
        "few": 2,
        "sha256": "",
    }
    assert report["map"]["name"] == "map"
    assert report["values"] == VALUES
    assert report["value_system"] == "schwartz10"
    assert len(report["pairs"]["pairs"]) == 1
    assert report["opposing"]["scenarios"] == 2
    assert report["dose"] is None
    assert "target shift" in result.stdout
    assert "] NeVA: replies power+1" in result.stdout
    assert (tmp_path / "out" / "report.md").read_text().startswith("# Evaluation of map\n")


def test_json_alone_stands_on_standard_output_and_baselines_beside_the_map(run: Any, tmp_path: Path) -> None:
    options = ["--methods", "caa,system-prompt", "--strengths", "1", "--pairs", 0, "--no-opposing", "--json"]
    result = run("out", *options, "--train-limit", 2)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert list(report["methods"]) == ["NeVA", "CAA", "System prompt"]
    assert report["fitted_on"] == {"train": 2, "dev": 3}
    assert report["pairs"] is None
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert "fitting CAA" in result.stderr


def test_an_interrupted_command_says_how_to_go_on_and_ends_with_the_same_report(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("whole").exit_code == 0
    put, done = kept.Kept.put, []

    def put_and_break(self: Any, name: str, found: Any) -> None:
        put(self, name, found)
        done.append(name)
        if len(done) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(kept.Kept, "put", put_and_break)
    result = run("killed")
    assert result.exit_code == 130
    assert "give the same command again" in result.stdout
    assert not (tmp_path / "killed" / "report.json").exists()
    assert run("killed").exit_code == 0
    assert len(set(done)) == len(done)
    for file in ("report.json", "report.md"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_two_processes_end_with_the_report_of_one(made: Path, tmp_path: Path) -> None:
    asked = {
        "neuron_map": str(made / "map"),
        "scenarios": str(made / "scenarios"),
        "pairs": 1,
        "texts": 2,
        "few": 2,
        "values": ["power", "security"],
    }
    wanted = job.run_job(job.Job(state=tmp_path / "one", **asked))
    found = job.run_job(job.Job(state=tmp_path / "two", **asked), processes=2)
    assert len(list((tmp_path / "two").glob("evaluate-*.state.json"))) == 2
    assert json.dumps(found) == json.dumps(wanted)


def test_a_process_that_fails_leaves_its_share_to_the_first_one(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dead:
        def __init__(self, **options: Any) -> None:
            pass

        def is_alive(self) -> bool:
            return False

        start = join = is_alive

    class Context:
        Process = Dead

    monkeypatch.setattr(job.multiprocessing, "get_context", lambda kind: Context)
    monkeypatch.setattr(job, "load_neutral_texts", lambda split, limit=None: TEXTS[:limit])
    asked = {"neuron_map": str(made / "map"), "scenarios": str(made / "scenarios")}
    found = job.run_job(job.Job(state=tmp_path / "dead", **asked), processes=2)
    assert json.dumps(found) == json.dumps(job.run_job(job.Job(state=tmp_path / "alone", **asked)))


@pytest.mark.parametrize(
    ("options", "given", "says"),
    [
        ([], {"map": "nowhere/at/all"}, "nowhere/at/all"),
        ([], {"scenarios": "nowhere"}, "no scenarios at 'nowhere'"),
        (["--split", "other"], {}, "no split 'other'"),
        (["--values", "powr"], {}, "did you mean 'power'"),
        (["--strengths", "1,x"], {}, "are no strengths"),
        (["--strengths", "0"], {}, "other than 0"),
        (["--methods", "cab"], {}, "There is no method 'cab'"),
        (["--methods", "caa"], {"scenarios": "single.jsonl"}, "single file"),
        (["--methods", "caa", "--split", "train"], {}, "fitted on the train split"),
        (["--pairs", "power"], {}, "is no pair"),
        (["--pairs", "power+powr"], {}, "did you mean 'power'"),
        ([], {"scenarios": "single.jsonl"}, "no reply of benevolence"),
        (["--dtype", "int3"], {}, "no type 'int3'"),
        (["--judge", "jury"], {}, "no judge 'jury'"),
        (["--judge", "text", "--answers", "0"], {}, "reads answers"),
        (["--judge", "llm"], {}, "NEVA_JUDGE_MODEL"),
        (["--tasks", "arc_easy"], {}, "--data"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(
    options: list[str], given: dict[str, str], says: str, run: Any, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NEVA_JUDGE_MODEL", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "--tasks" in options:
        pytest.importorskip("lm_eval")
    if "--judge" in options and "text" in options:
        pytest.importorskip("sklearn")
    paths = {name: str(made / text) if (made / text).exists() else text for name, text in given.items()}
    assert says in refused(run("out", "--json", *options, **paths))


def test_an_output_that_is_a_file_is_refused_before_anything_is_loaded(run: Any, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    assert "is a file" in refused(run("out", "--json", map="nowhere/at/all"))


def test_answers_are_generated_and_judged_by_a_classifier(
    run: Any, made: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    pytest.importorskip("sklearn")
    options = [
        "--judge",
        "text",
        "--answers",
        2,
        "--max-new-tokens",
        4,
        "--pairs",
        0,
        "--no-opposing",
        "--strengths",
        1,
    ]
    result = run("out", *options)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    told = report["answers"]["methods"]["NeVA"]
    assert [one["dials"] for one in told["answers"]] == [{value: 1.0} for value in VALUES]
    assert [len(one["texts"]) for one in told["answers"]] == [2] * 3
    assert len(report["answers"]["base"]["answers"]) == 1
    judged = report["judged_text"]
    assert list(judged["methods"]["NeVA"]["values"]) == VALUES
    assert "right on unseen replies" in judged["methods"]["NeVA"]["note"]
    told = (tmp_path / "out" / "report.md").read_text()
    assert "## Generated answers" in told
    assert "## Answers judged (text)" in told
