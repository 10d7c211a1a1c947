"""How much one visitor may ask of the model, and the line in which visitors wait for it.

Invariant: the model runs for one call at a time, on one thread that stays. So what one visitor gets does not depend on
who else is there, and memory does not grow with the number of calls.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from neva_hf.errors import NeVAError


@dataclass(frozen=True)
class Limits:
    """What a call may ask for, and how long it may take.

    Args:
        question_chars (`int`): The longest question.
        history_chars (`int`): The longest conversation before it, both sides together.
        prompt_tokens (`int`): The longest question with its conversation, in tokens.
        new_tokens (`int`): The longest answer, in tokens.
        temperature (`float`): The highest.
        rows (`int`): The most answers that are made together.
        seconds (`float`): How long answers may take once they have begun; then they end as they are.
        wait_seconds (`float`): How long a call waits for its turn.
        waiting (`int`): How many calls may wait.
        values (`int`): The most values that a visitor's map may have.
        map_bytes (`int`): The largest file of a visitor's map.
        maps (`int`): How many visitors' maps are kept loaded.
    """

    question_chars: int = 2000
    history_chars: int = 40_000
    prompt_tokens: int = 1536
    new_tokens: int = 256
    temperature: float = 2.0
    rows: int = 8
    seconds: float = 90.0
    wait_seconds: float = 300.0
    waiting: int = 60
    values: int = 40
    map_bytes: int = 32 * 2**20
    maps: int = 4


class Worker:
    """Runs jobs one after another on one thread, in the order in which they came.

    Args:
        waiting (`int`): How many may wait.
    """

    def __init__(self, waiting: int) -> None:
        self._most = waiting
        self._lock = threading.Lock()
        self._count = 0
        self._executor: ThreadPoolExecutor | None = None
        self._process = 0

    def submit(self, job: Callable[[], None]) -> Future[None]:
        """Puts a job at the end of the line.

        Args:
            job (`Callable[[], None]`): What to run.

        Returns:
            `Future`: For waiting, and for leaving the line (`cancel`).

        Raises:
            `NeVAError`: If too many wait already.
        """
        with self._lock:
            if self._process != os.getpid():
                # After a fork (ZeroGPU does it) there is no thread any more, and nobody in the line.
                self._executor = ThreadPoolExecutor(1, thread_name_prefix="neva-space")
                self._process, self._count = os.getpid(), 0
            if self._count > self._most:
                raise NeVAError(f"{self._count} people are waiting for the model already. Try again in a minute.")
            self._count += 1
            assert self._executor is not None
            future = self._executor.submit(job)
        future.add_done_callback(self._leave)
        return future

    @property
    def busy(self) -> int:
        """How many jobs run or wait."""
        return self._count

    def _leave(self, future: Future[None]) -> None:
        with self._lock:
            self._count -= 1
