"""Many visitors at once on the page: is everybody's answer their own, does nothing crash, is memory flat?

    python benchmarks/space_load.py --visitors 20 --minutes 4

It starts `neva space` in a process of its own, lets one visitor ask everything alone, then all of them at once for some
minutes, and holds every answer against the one given alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradio_client import Client

from neva_hf.space.state import PRESETS, QUESTIONS

MEGABYTE = 1024.0  # of /proc's kilobytes


@dataclass
class Tally:
    """What the visitors saw."""

    right: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def asked(tokens: int) -> list[tuple[Any, ...]]:
    """Different questions, dials, seeds and temperatures, as `/answer` takes them."""
    return [
        (QUESTIONS[place % len(QUESTIONS)], preset.dials, place, tokens, 0.9 * (place % 2), False)
        for place, preset in enumerate(PRESETS)
    ]


def started(options: list[str]) -> tuple[subprocess.Popen[str], str]:
    """The page in a process of its own, and its address."""
    command = [sys.executable, "-u", "-m", "neva_hf.cli", "space", "--no-open", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            # (a full pipe would stop the page)
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return process, found.group()
    raise SystemExit("The page did not start:\n" + "".join(lines))


def memory(pid: int) -> float:
    """What a process holds in memory, in MB, of Linux."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / MEGABYTE  # type: ignore[index]


def visitor(number: int, address: str, calls: list[Any], alone: list[Any], until: float, tally: Tally) -> None:
    """One visitor: asks one thing after another until the time is over."""
    client = Client(address, verbose=False)
    place = number
    while time.monotonic() < until:
        place = (place + 1) % len(calls)
        begun = time.monotonic()
        try:
            found = client.predict(*calls[place], api_name="/answer")
        except Exception as error:
            with tally.lock:
                tally.failed.append(f"{type(error).__name__}: {error}")
            continue
        with tally.lock:
            tally.seconds.append(time.monotonic() - begun)
            if list(found) == list(alone[place]):
                tally.right += 1
            else:
                tally.wrong.append(f"call {place}: {found!r:.300} instead of {alone[place]!r:.300}")


def run(visitors: int, minutes: float, tokens: int, options: list[str]) -> dict[str, Any]:
    """Everything; returns the figures."""
    process, address = started(options)
    try:
        calls, one = asked(tokens), Client(address, verbose=False)
        alone = [one.predict(*call, api_name="/answer") for call in calls]
        tally, until = Tally(), time.monotonic() + 60 * minutes
        held = [memory(process.pid)]
        threads = [
            threading.Thread(target=visitor, args=(number, address, calls, alone, until, tally))
            for number in range(visitors)
        ]
        for thread in threads:
            thread.start()
        step = 60 * minutes / 12
        while any(thread.is_alive() for thread in threads):
            time.sleep(min(step, 5.0) if time.monotonic() > until else step)
            held.append(memory(process.pid))
        again = [one.predict(*call, api_name="/answer") for call in calls]
        return {
            "visitors": visitors,
            "minutes": minutes,
            "tokens": tokens,
            "answers": tally.right + len(tally.wrong),
            "as_alone": tally.right,
            "wrong": tally.wrong[:5],
            "failed": len(tally.failed),
            "failures": sorted(set(tally.failed))[:5],
            "same_afterwards": again == alone,
            "page_runs": process.poll() is None,
            "median_seconds": round(statistics.median(tally.seconds), 1) if tally.seconds else None,
            "longest_seconds": round(max(tally.seconds), 1) if tally.seconds else None,
            "memory_mb": [round(size) for size in held],
            "cores": os.cpu_count(),
        }
    finally:
        process.terminate()
        process.wait(30)


def main() -> None:
    """Runs it and prints the figures as JSON; ends with 1 if an answer was wrong or a call failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--visitors", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--map", help="A map other than the published one.")
    parser.add_argument("--base", help="A base model other than the map's.")
    parser.add_argument("--output", type=Path, help="Where to write the figures as JSON too.")
    given = parser.parse_args()
    options = [
        text for name in ("map", "base") if getattr(given, name) for text in (f"--{name}", getattr(given, name))
    ]
    figures = run(given.visitors, given.minutes, given.tokens, options)
    text = json.dumps(figures, indent=2)
    print(text)
    if given.output:
        given.output.write_text(text + "\n", encoding="utf-8")
    good = figures["page_runs"] and figures["same_afterwards"] and not figures["wrong"] and not figures["failed"]
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
