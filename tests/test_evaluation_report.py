"""A report as files: the same numbers in JSON, Markdown and pictures, readable, and safe to show."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from tiny import SCENARIOS, TEXTS, VALUES, random_map, tiny_reader, tiny_tokenizer

from neva_hf import NeVAError
from neva_hf.baselines import from_model
from neva_hf.evaluation import Extra, evaluate, pictures, read_report, write_report
from neva_hf.evaluation.assembly import SCHEMA
from neva_hf.evaluation.markdown import WORDS, markdown
from neva_hf.evaluation.words import escaped, ranged, shown
from neva_hf.values import load_value_system

SYSTEM = load_value_system()


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    base = tiny_reader()
    model = random_map(base).apply_to(base)
    capability = Extra(
        "capability",
        0,
        lambda method, dials, found: 1,
        sum_up=lambda base, found: {"arc_easy": {"base": 0.5, "points": -1.25, "error": None, "questions": 8}},
    )
    return evaluate(
        [from_model(model), from_model(model, "again")],
        model,
        tiny_tokenizer(),
        SCENARIOS,
        neutral_texts=TEXTS,
        samples=50,
        pairs=2,
        opposing=True,
        dose=[-1.0, 1.0],
        few=2,
        system=SYSTEM,
        extras=[capability],
        about={"map": {"name": "a|map <b>", "fingerprint": "0" * 12, "base_model": "tiny"}, "fitted_on": {"train": 3}},
    )


def test_the_json_is_the_report_and_is_read_again(report: dict[str, Any], tmp_path: Path) -> None:
    folder = write_report(report, tmp_path / "out", system=SYSTEM, pictures=False)
    text = (folder / "report.json").read_text()
    assert read_report(folder) == {**report, "pictures": {}}
    assert json.loads(text)["schema"] == SCHEMA
    # One line per list of numbers.
    assert '"power": {\n' in text
    assert re.search(r'"target": \[-?[0-9.e-]+, -?[0-9.e-]+, -?[0-9.e-]+\]', text)
    assert sorted(file.name for file in folder.iterdir()) == ["report.json", "report.md"]


def test_the_words_say_of_every_number_what_it_is_and_which_direction_is_good(report: dict[str, Any]) -> None:
    told = markdown(report)
    for word, text in WORDS.items():
        assert f"- **{word}**: {text}" in told
        assert re.search(r"higher is better|lower is better", text, re.IGNORECASE)
    for head in ("All methods", "value by value", "Where it leaks to", "Choices between two values", "Two dials at once",
                 "A system prompt that pushes the other way", "Capability", "Where this comes from"):  # fmt: skip
        assert head in told
    without = {key: item for key, item in report.items() if key != "capability"}
    short = markdown({**without, "pairs": None, "opposing": None})
    assert "capability" not in short.lower()
    assert "Two dials" not in short


def test_tables_hold_the_numbers_of_the_json_and_have_as_many_cells_as_heads(report: dict[str, Any]) -> None:
    told = markdown(report)
    found = report["methods"]["NeVA"]["strengths"]["+1"]
    assert f"| NeVA | +1 | {ranged(found['target'], '+.3f')} | " in told
    for value in VALUES:
        assert f"| {value.replace('_', chr(92) + '_')} | {ranged(found['values'][value]['target'], '+.3f')} |" in told
    width = None
    for line in told.splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else None
        assert width is None or cells is None or cells == width
        width = cells
    # Of 100 questions, in how many the row's value wins before and after.
    pairs = [tuple(pair) for pair in found["choices"]["pairs"]]
    place = pairs.index(("power", "security"))
    before, after = found["choices"]["before"][place], found["choices"]["after"]["power"][place]
    (row,) = re.findall(r"At \+1:\n\n\| dialled.*?\n\| power \|(.*?)\n", told, re.DOTALL)
    assert f"{100 * before:.0f} → {100 * after:.0f}" in row


def test_texts_of_strangers_are_shown_as_text(report: dict[str, Any]) -> None:
    told = markdown({**report, "model": {**report["model"], "name": "x](javascript:a) <script>\x1b[2J\nline"}})
    assert "<script>" not in told
    assert "\x1b" not in told
    assert "](javascript" not in told.replace("\\](", "")
    assert "# Evaluation of a\\|map &lt;b&gt;\n" in told
    assert escaped("a\nb" * 200).count("\n") == 0
    assert len(escaped("x" * 999)) == 200


def test_numbers_that_are_not_defined_and_ends_that_do_not_exist_are_said_so() -> None:
    assert ranged([None, None, None]) == "n/a"
    assert ranged([1.0, 0.5, None]) == "1.000 [0.500, ?]"
    assert (shown(-0.0001, "+.3f"), shown(-0.0001), shown(-1.0, "+.1f")) == ("+0.000", "0.000", "-1.0")


def test_pictures_are_drawn_from_the_same_numbers_with_alt_text(report: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = write_report(report, tmp_path, system=SYSTEM)
    drawn = read_report(folder)["pictures"]
    assert {"leakage_matrix_plus_1.png", "value_circle_minus_1.png", "dose_curves.png", "methods.png"} <= set(drawn)
    told = (folder / "report.md").read_text()
    for file, alt in drawn.items():
        assert (folder / file).stat().st_size > 10_000
        assert len(alt) > 20
        assert f"({file})" in told


def test_shifts_are_drawn_as_they_were_measured(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    from neva_hf.evaluation import plots

    seen: list[Any] = []
    monkeypatch.setattr(
        plots, "leakage_matrix", lambda path, shifts, *more, **options: seen.append((shifts, options)) or ""
    )
    pictures.draw(report, tmp_path)
    for (shifts, options), side in zip(seen, ("+1", "-1"), strict=True):
        told = report["methods"]["NeVA"]["strengths"][side]
        assert options["strength"] == float(side)
        for row, cells in enumerate(told["shifts"]):
            for column, cell in enumerate(cells):
                if cell is None:
                    assert math.isnan(shifts[row][column])
                    continue
                assert shifts[row][column] == float(side) * cell
                low, high = options["intervals"][row][column]
                assert low <= high
                assert sorted([float(side) * end for end in told["shifts_95"][row][column]]) == [low, high]


def test_without_matplotlib_the_report_is_written_and_says_what_to_install(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    said: list[str] = []
    folder = write_report(report, tmp_path, tell=said.append)
    assert said == [
        'No pictures: they need matplotlib. Install it with pip install "neva-hf[plots]", and run this again.'
    ]
    assert "## Pictures" not in (folder / "report.md").read_text()


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NeVAError, match="run `neva evaluate` first"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text('{"schema": "other"}')
    with pytest.raises(NeVAError, match="schema 'other'"):
        read_report(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NeVAError, match="is a file"):
        write_report({}, tmp_path / "file")
