"""How answers grow, and the line in which they wait."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from space_tools import tokenizer

from neva_hf import NeVAError
from neva_hf.space.limits import Limits, Worker
from neva_hf.space.rows import Rows, RowStreamer, read_rows, shown
from neva_hf.talk import NEXT_QUESTION


@pytest.mark.parametrize("size", range(1, len(NEXT_QUESTION)))
def test_what_may_become_the_stop_text_is_held_back_until_it_is_known(size: int) -> None:
    beginning = NEXT_QUESTION[:size]
    assert shown("Well." + beginning, NEXT_QUESTION, last=False) == "Well."
    assert shown("Well." + beginning, NEXT_QUESTION, last=True) == "Well." + beginning
    assert shown("Well." + beginning + "!", NEXT_QUESTION, last=False) == "Well." + beginning + "!"
    assert shown("Well." + NEXT_QUESTION + " Why?", NEXT_QUESTION, last=False) == "Well."


def streamed(rows: list[str], chat: bool = True, ends: tuple[int, ...] = ()) -> tuple[list[list[str]], RowStreamer]:
    """What a reader sees of texts that come token by token."""
    told: list[list[str]] = []
    reader = tokenizer(chat)
    ids = [reader(row, add_special_tokens=False)["input_ids"] for row in rows]
    longest = max(map(len, ids))
    stop = None if chat else NEXT_QUESTION
    streamer = RowStreamer(reader, len(rows), ends, stop, lambda found: told.append(found.texts))
    streamer.put(torch.zeros(len(rows), 5, dtype=torch.long))
    for step in range(longest):
        streamer.put(torch.tensor([row[step] if step < len(row) else 0 for row in ids]))
    return told, streamer


def test_half_a_character_is_not_shown() -> None:
    told, streamer = streamed(["é€x", "abcdef"])
    assert [texts[0] for texts in told] == ["", "é", "é", "é", "é€", "é€x"]
    assert [texts[1] for texts in told] == ["a", "ab", "abc", "abcd", "abcde", "abcdef"]
    assert streamer.texts(last=True) == ["é€x", "abcdef"]


def test_the_prompt_is_no_part_of_the_answer() -> None:
    told, streamer = streamed(["ab", "cd"])
    assert streamer.tokens == 2
    assert told[0] == ["a", "c"]


def test_rows_end_at_their_own_end() -> None:
    end = tokenizer().get_vocab()["."]
    told, streamer = streamed(["no.way", "go on ."], ends=(end,))
    assert streamer.texts(last=True) == ["no", "go on"]
    assert streamer.over == [True, True]
    assert told[3] == ["no", "go o"]


def test_a_model_without_a_chat_template_ends_before_it_asks_itself() -> None:
    _, streamer = streamed(["yes\nQuestion: what", "no, but why so many"], chat=False)
    assert streamer.over == [True, False]
    assert streamer.texts(last=True) == ["yes", "no, but why so many"]
    _, chatting = streamed(["yes\nQuestion: what", "no"])
    assert chatting.texts(last=True)[0] == "yes\nQuestion: what"


def test_a_slow_reader_gets_the_newest_and_the_last() -> None:
    worker, all_told = Worker(5), threading.Event()

    def work(tell: Any, gone: threading.Event) -> Rows:
        for number in range(10):
            tell(Rows([str(number)], number))
        all_told.set()
        return Rows(["end"], 10, done=True)

    reading = read_rows(worker, Limits(), work)
    assert next(reading).texts in [[str(number)] for number in range(10)] + [["end"]]
    assert all_told.wait(timeout=60)
    worker.submit(lambda: None).result(timeout=60)
    assert [found.texts for found in reading] in ([["end"]], [])


def test_jobs_run_one_at_a_time_in_the_order_in_which_they_came() -> None:
    worker, running, ran = Worker(50), threading.Lock(), []

    def job(number: int) -> None:
        assert running.acquire(blocking=False)
        ran.append((number, threading.get_ident()))
        running.release()

    futures = [worker.submit(lambda number=number: job(number)) for number in range(20)]  # type: ignore[misc]
    for future in futures:
        future.result(timeout=60)
    assert [number for number, _ in ran] == list(range(20))
    # One thread for all: every new one would bring its own pool of computing threads.
    assert len({thread for _, thread in ran}) == 1
    assert worker.busy == 0


def test_who_leaves_a_full_line_makes_room() -> None:
    worker, go_on = Worker(1), threading.Event()
    worker.submit(lambda: waited(go_on))
    waiting = worker.submit(lambda: None)
    with pytest.raises(NeVAError, match="2 people are waiting"):
        worker.submit(lambda: None)
    assert waiting.cancel()
    worker.submit(lambda: None)
    go_on.set()


def waited(event: threading.Event) -> None:
    assert event.wait(timeout=60)


def test_a_forked_process_has_a_line_of_its_own() -> None:
    code = """
import os, threading
from neva_hf.space.limits import Worker
worker = Worker(1)
go_on = threading.Event()
worker.submit(go_on.wait)
worker.submit(lambda: None)
child = os.fork()
if child == 0:
    worker.submit(lambda: None).result(timeout=60)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
go_on.set()
"""
    if not hasattr(sys, "platform") or sys.platform == "win32":
        pytest.skip("no fork here")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, timeout=300)
    assert done.stdout.strip() == b"7", done.stderr
