"""The current dials as code: Python, command line, curl, a stock adapter, and the edit itself as JSON.

The page's API that `curl` calls: endpoint `/answer` (api_name="answer") with the inputs, in this order,
question: str, dials: dict, seed: int, max_new_tokens: int, temperature: float, gate: bool
"""

from __future__ import annotations

from collections.abc import Mapping

from .engine import Engine

API_NAME = "answer"
API_INPUTS = ("question", "dials", "seed", "max_new_tokens", "temperature", "gate")


def python(engine: Engine, dials: Mapping[str, float], question: str, seed: int, url: str = "") -> str:
    return ""


def command_line(engine: Engine, dials: Mapping[str, float], question: str, seed: int, url: str = "") -> str:
    return ""


def curl(engine: Engine, dials: Mapping[str, float], question: str, seed: int, url: str = "") -> str:
    return ""


def stock(engine: Engine, dials: Mapping[str, float], question: str, seed: int, url: str = "") -> str:
    return ""


def edit_json(engine: Engine, dials: Mapping[str, float], question: str, seed: int, url: str = "") -> str:
    return "{}"
