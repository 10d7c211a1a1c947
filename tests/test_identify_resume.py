"""A pass that is killed goes on where it was, and processes that share it end with the same map."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SCENARIOS, VALUES, tiny_reader, tiny_tokenizer

from neva_hf import NeuronMap
from neva_hf.identify import Statistics, collect

MANY = SCENARIOS * 5
# (the package has a function of that name)
COLLECT = importlib.import_module("neva_hf.identify.collect")

SCRIPT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from tiny import SCENARIOS, TEXTS, tiny_reader, tiny_tokenizer
from neva_hf import identify_neurons
from neva_hf.identify.parallel import processes

def progress(items, what):
    for number, item in enumerate(items):
        if what == {kill_in!r} and number == {kill_at}:
            os.kill(os.getpid(), signal.SIGKILL)
        yield item

found = identify_neurons(
    tiny_reader(), tiny_tokenizer(), SCENARIOS * 5, neurons=8, neutral_texts=TEXTS, leakage_penalty=1.0,
    gains=True, dose_scenarios=SCENARIOS[:2], checkpoint={checkpoint!r}, progress=progress,
)
number, count = processes()
Path({output!r} + f".{{number}}_of_{{count}}").touch()
if number == 0:
    found.save_pretrained({output!r})
"""


class Interrupted(Exception):
    pass


def breaking(after: int) -> Any:
    def progress(items: Iterable[Any], what: str) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == after:
                raise Interrupted
            yield item

    return progress


def assert_same(one: Statistics, other: Statistics) -> None:
    theirs = other.tensors()
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("worth", [1, 10**6], ids=["in groups", "together"])
def test_an_interrupted_pass_ends_with_the_same_sums_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worth: int
) -> None:
    monkeypatch.setattr(COLLECT, "worth_of_a_pass", lambda device: worth)
    model, tokenizer = tiny_reader(), tiny_tokenizer()
    whole = collect(model, tokenizer, MANY, VALUES)
    with pytest.raises(Interrupted):
        collect(model, tokenizer, MANY, VALUES, checkpoint=tmp_path / "pass", checkpoint_every=2, progress=breaking(7))
    seen: list[int] = []

    def counting(items: Any, what: str) -> Any:
        seen.append(len(items))
        return items

    resumed = collect(
        model, tokenizer, MANY, VALUES, checkpoint=tmp_path / "pass", checkpoint_every=2, progress=counting
    )
    assert seen == [len(MANY) - 6]
    assert_same(whole, resumed)


@pytest.mark.parametrize("change", ["scenarios", "values", "broken", "model"])
def test_a_checkpoint_of_something_else_is_not_taken_up(change: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_reader(), tiny_tokenizer()
    collect(model, tokenizer, MANY, VALUES, checkpoint=tmp_path / "pass", checkpoint_every=2)
    scenarios, values = MANY, VALUES
    if change == "scenarios":
        scenarios = MANY[::-1]
    elif change == "values":
        values = VALUES[::-1]
    elif change == "broken":
        (file,) = tmp_path.iterdir()
        file.write_bytes(file.read_bytes()[:-50])
    else:
        model.name_or_path = "another"
    assert_same(
        collect(model, tokenizer, scenarios, values),
        collect(model, tokenizer, scenarios, values, checkpoint=tmp_path / "pass"),
    )


def run(tmp_path: Path, output: str, *launcher: str, kill_in: str = "", kill_at: int = -1) -> int:
    """Identifies in a process of its own, and returns how it ended."""
    script = tmp_path / f"{output}.py"
    script.write_text(
        SCRIPT.format(
            tests=str(Path(__file__).parent),
            kill_in=kill_in,
            kill_at=kill_at,
            checkpoint=str(tmp_path / "pass"),
            output=str(tmp_path / output),
        )
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *launcher, str(script)], env=environment, check=False).returncode


def test_a_run_killed_by_the_system_ends_with_the_same_map_bit_for_bit(tmp_path: Path) -> None:
    for kill_in, kill_at in (("scenarios", 12), ("sensitivity", 40), ("replies", 5)):
        assert run(tmp_path, "killed", kill_in=kill_in, kill_at=kill_at) == -signal.SIGKILL
    assert list(tmp_path.glob("pass.*"))
    assert run(tmp_path, "resumed") == 0
    for file in tmp_path.glob("pass.*"):
        file.unlink()
    assert run(tmp_path, "whole") == 0
    resumed, whole = (NeuronMap.from_pretrained(tmp_path / name) for name in ("resumed", "whole"))
    assert resumed.config.units == whole.config.units
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name])


def test_two_processes_end_with_the_map_of_one(tmp_path: Path) -> None:
    assert run(tmp_path, "one") == 0
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert run(tmp_path, "two", *launcher) == 0
    assert (tmp_path / "two.0_of_2").exists()
    assert (tmp_path / "two.1_of_2").exists()
    one, two = (NeuronMap.from_pretrained(tmp_path / name) for name in ("one", "two"))
    assert one.state_dict().keys() == two.state_dict().keys()
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
    for value, units in one.config.units.items():
        assert two.config.units[value] == pytest.approx(units, rel=1e-3)
        curves = [found.config.measurements["dose"]["curves"][value] for found in (one, two)]
        assert curves[1]["kl"] == pytest.approx(curves[0]["kl"], rel=1e-2)
        for seen, points in curves[0]["margins"].items():
            assert curves[1]["margins"][seen] == pytest.approx(points, rel=1e-2, abs=1e-3)
