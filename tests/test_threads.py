"""Threads that share one model object each get exactly what they get alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from test_edit_against_reference import KINDS, Collect
from tiny import batch, tiny_model, tiny_pair
from transformers.generation.streamers import BaseStreamer

ROUNDS = 12
DIALS: list[dict[str, float] | list[dict[str, float]]] = [
    [{"benevolence": 1.0}, {}, {"power": -1.0}],
    [{}, {"security": 2.0}, {}],
    {"power": 1.5},
    {},
]

each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def change_threads_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(jobs: list[Callable[[], Any]], rounds: int = ROUNDS) -> list[list[Any]]:
    """Runs each job in a thread of its own, many times over, all starting at once; re-raises what they raise."""
    barrier = threading.Barrier(len(jobs))
    results: list[list[Any]] = [[] for _ in jobs]
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            for _ in range(rounds):
                barrier.wait(timeout=60)
                results[number].append(jobs[number]())
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def assert_as_alone(jobs: list[Callable[[], torch.Tensor]]) -> None:
    alone = [job() for job in jobs]
    for first, second in pairwise(alone):
        assert not torch.equal(first, second), "jobs that give the same would prove nothing"
    for wanted, got in zip(alone, together(jobs), strict=True):
        assert len(got) == ROUNDS
        assert all(torch.equal(one, wanted) for one in got)


def forward(model: Any, dial: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(), strengths=dial, **kwargs).logits


def generate(model: Any, **kwargs: Any) -> torch.Tensor:
    found = model.generate(
        **batch(padding="left"), max_new_tokens=3, output_logits=True, return_dict_in_generate=True, **kwargs
    )
    return torch.stack(found.logits)


def in_context(model: Any, dial: Any) -> torch.Tensor:
    with model.strengths(dial):
        return torch.cat([generate(model), generate(model)])


@each_kind
def test_forward_in_threads_sees_its_own_strengths(kind: str) -> None:
    _, model, _ = tiny_pair(**KINDS[kind])
    assert_as_alone([lambda dial=dial: forward(model, dial) for dial in DIALS])


@each_kind
def test_generate_in_threads_sees_its_own_strengths_at_every_step(kind: str) -> None:
    _, model, _ = tiny_pair(**KINDS[kind])
    assert_as_alone([lambda dial=dial: generate(model, strengths=dial) for dial in DIALS])


@each_kind
def test_beams_in_threads_see_their_own_strengths(kind: str) -> None:
    _, model, _ = tiny_pair("opt", **KINDS[kind])
    assert_as_alone([lambda dial=dial: generate(model, strengths=dial, num_beams=2) for dial in DIALS])


@each_kind
def test_contexts_in_threads_see_their_own_strengths(kind: str) -> None:
    _, model, _ = tiny_pair("gpt2", **KINDS[kind])
    assert_as_alone([lambda dial=dial: in_context(model, dial) for dial in DIALS])


def test_a_thread_without_strengths_sees_what_is_set_on_the_model() -> None:
    _, model, _ = tiny_pair(gain=True)
    model.set_strengths(security=1.0)
    assert_as_alone(
        [
            lambda: forward(model, None),
            lambda: in_context(model, DIALS[0]),
            lambda: generate(model),
            lambda: forward(model, DIALS[2], gate=False),
        ]
    )


def test_calls_that_raise_in_one_thread_leave_the_others_alone() -> None:
    _, model, _ = tiny_pair(gain=True)
    wanted = forward(model, DIALS[0])

    def fails() -> None:
        with pytest.raises(IndexError):
            model(input_ids=torch.full((3, 2), 10**6), strengths=DIALS[1])

    _, got = together([fails, lambda: forward(model, DIALS[0])])
    assert all(torch.equal(one, wanted) for one in got)


def test_a_context_of_one_thread_is_not_seen_by_a_thread_started_inside_it() -> None:
    base, model, _ = tiny_pair()
    with torch.no_grad():
        wanted = base(**batch()).logits
    with model.strengths(power=2.0):
        [[got]] = together([lambda: forward(model, None)], rounds=1)
    assert torch.equal(got, wanted)


def test_two_models_in_threads_do_not_meet() -> None:
    _, first, _ = tiny_pair()
    _, second, _ = tiny_pair(seed=3, gain=True)
    assert_as_alone([lambda: generate(first, strengths=DIALS[0]), lambda: generate(second, strengths=DIALS[0])])


def test_default_strengths_are_ready_when_many_threads_are_the_first_to_ask(tmp_path: Path) -> None:
    # transformers fills the tensors of an adapter without telling it, so the edit is made when it is first used.
    _, model, neuron_map = tiny_pair(gain=True, default_strengths={"power": 1.0})
    neuron_map.save_pretrained(tmp_path)
    loaded = tiny_model()
    loaded.load_adapter(str(tmp_path))

    def forward_loaded() -> torch.Tensor:
        with torch.no_grad():
            return loaded(**batch()).logits

    for got in together([forward_loaded] * 4, rounds=1):
        assert torch.equal(got[0], forward(model, None))


class Queue(BaseStreamer):
    """As the queue of a chat server: the tokens are read by another thread while they come."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = threading.Event()

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.reshape(-1).tolist()

    def end(self) -> None:
        self.ended.set()


@each_kind
def test_streams_in_threads_get_the_tokens_of_their_own_strengths(kind: str) -> None:
    _, model, _ = tiny_pair(**KINDS[kind])
    inputs, dials = batch(rows=1), [{"power": 2.0}, {"benevolence": -2.0}, {"security": 2.0}, {}]
    wanted = []
    for dial in dials:
        streamer = Collect()
        model.generate(**inputs, strengths=dial, max_new_tokens=8, streamer=streamer)
        wanted.append(streamer.tokens)
    assert len({tuple(tokens) for tokens in wanted}) == len(dials)
    streams = [Queue() for _ in dials]
    workers = [
        threading.Thread(
            target=model.generate, kwargs={**inputs, "strengths": dial, "max_new_tokens": 8, "streamer": stream}
        )
        for dial, stream in zip(dials, streams, strict=True)
    ]
    for worker in workers:
        worker.start()
    for worker, stream, tokens in zip(workers, streams, wanted, strict=True):
        assert stream.ended.wait(timeout=60)
        worker.join()
        assert stream.tokens == tokens
