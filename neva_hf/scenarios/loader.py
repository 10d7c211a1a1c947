"""Reading scenarios, the shipped ones and users' own, with errors that name file and line.

A file is JSON Lines; each line is one scenario:

    {"id": "work-advice", "domain": "work", "form": "advice", "question": "...",
     "replies": {"self_direction": "...", "stimulation": "...", "-stimulation": "..."}}

`replies` maps a value to a reply that lives by it; a key `-v` marks a reply that opposes v (for single traits). Only
`question` and `replies` are required.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neva_hf.errors import NeVAError

SCENARIO_SETS = ("schwartz", "big_five")
SPLITS = ("train", "dev", "test")
NEUTRAL_SPLITS = ("calibration", "heldout")

MAX_TEXT = 20_000

_KEY = re.compile(r"-?[a-z][a-z0-9_]{0,63}\Z")
_FIELDS = {"id", "domain", "form", "question", "replies"}


@dataclass(frozen=True)
class Scenario:
    """A question and replies to it, each living by another value, matched in length and style.

    Args:
        question (`str`): What a user asks.
        replies (`Mapping[str, str]`): Value (or `-value`, for one that opposes it) -> reply. At least two.
        id (`str`): A name that is unique in its set.
        domain (`str`): The part of life that it is about.
        form (`str`): The form of the question, such as `advice` or `policy`.

    Raises:
        `NeVAError`: If a part is missing or cannot be used.

    Example:

    ```py
    >>> from neva_hf.scenarios import Scenario
    >>> Scenario("Where to?", {"stimulation": "Somewhere new.", "security": "Somewhere safe."}).values
    ['stimulation', 'security']
    ```
    """

    question: str
    replies: Mapping[str, str]
    id: str = ""
    domain: str = ""
    form: str = ""
    values: list[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_text(self.question, "`question`")
        # `datasets` fills fields and replies that a scenario does not have with None.
        for name in ("id", "domain", "form"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, "")
            elif not isinstance(getattr(self, name), str):
                raise NeVAError(f"`{name}` must be some text, got {getattr(self, name)!r:.80}.")
        if not isinstance(self.replies, Mapping):
            raise NeVAError("`replies` must map each value to a reply, such as {'power': '...', 'security': '...'}.")
        replies = {key: reply for key, reply in self.replies.items() if reply is not None}
        if len(replies) < 2:
            raise NeVAError(f"`replies` must hold at least two replies to contrast, got {len(replies)}.")
        for key, reply in replies.items():
            if not isinstance(key, str) or not _KEY.match(key):
                raise NeVAError(
                    f"{key!r:.80} in `replies` is no value name: use lower case, such as 'self_direction'."
                )
            _check_text(reply, f"the reply of {key!r}")
        object.__setattr__(self, "replies", replies)
        object.__setattr__(self, "values", list(dict.fromkeys(key.removeprefix("-") for key in replies)))


def load_scenarios(
    name_or_path: str | os.PathLike[str] = "schwartz", split: str | None = "train", limit: int | None = None
) -> list[Scenario]:
    """Loads scenarios.

    Args:
        name_or_path (`str` or `os.PathLike`):
            A shipped set (`"schwartz"`), a JSON Lines file, or a folder with `train.jsonl`, `dev.jsonl`, `test.jsonl`.
        split (`str`, *optional*): Which of a set's or folder's files; all of them when `None`. Ignored for a file.
        limit (`int`, *optional*): At most so many, from the front. The shipped ones are ordered so that the first few
            cover all forms and many domains.

    Returns:
        `list[Scenario]`: The scenarios, in the order of the file.

    Raises:
        `NeVAError`: If there is nothing at that place, or a line cannot be used; the message names file and line.

    Example:

    ```py
    >>> from neva_hf.scenarios import load_scenarios
    >>> len(load_scenarios("schwartz", split="train", limit=3))
    3
    ```
    """
    _check_limit(limit)
    path = Path(__file__).parent / str(name_or_path) if name_or_path in SCENARIO_SETS else Path(name_or_path)
    if path.is_dir():
        if split is not None and not (path / f"{split}.jsonl").is_file():
            there = sorted(file.stem for file in path.glob("*.jsonl"))
            raise NeVAError(
                f"There is no split {split!r} in {name_or_path}: {split}.jsonl is missing (found: {there})."
            )
        files = [path / f"{split}.jsonl"] if split is not None else sorted(path.glob("*.jsonl"))
    elif path.is_file():
        files = [path]
    else:
        raise NeVAError(
            f"There are no scenarios at {str(name_or_path)!r}: give one of the shipped sets {list(SCENARIO_SETS)}, a "
            "JSON Lines file, or a folder with train.jsonl."
        )
    scenarios = [scenario for file in files for scenario in _read(file)]
    if not scenarios:
        raise NeVAError(f"{name_or_path} holds no scenarios.")
    return scenarios[:limit]


def load_neutral_texts(split: str = "calibration", limit: int | None = None) -> list[str]:
    """Texts without any lean to a value, for measuring what an edit costs.

    Args:
        split (`str`): `"calibration"`, for setting strengths, or `"heldout"`, for reports.
        limit (`int`, *optional*): At most so many.

    Returns:
        `list[str]`: Some hundred words each.

    Raises:
        `NeVAError`: If there is no such split.

    Example:

    ```py
    >>> from neva_hf.scenarios import load_neutral_texts
    >>> len(load_neutral_texts("heldout"))
    32
    ```
    """
    if split not in NEUTRAL_SPLITS:
        raise NeVAError(f"There is no neutral text {split!r}: choose one of {list(NEUTRAL_SPLITS)}.")
    _check_limit(limit)
    lines = _lines(Path(__file__).parent / "neutral" / f"{split}.jsonl")
    return [json.loads(line)["text"] for line in lines if line.strip()][:limit]


def scenario_values(scenarios: Iterable[Scenario]) -> list[str]:
    """All values that some scenarios contrast, in the order of their first appearance."""
    return list(dict.fromkeys(value for scenario in scenarios for value in scenario.values))


def scenarios_hash(scenarios: Sequence[Scenario]) -> str:
    """A fingerprint of the words of some scenarios, for the provenance of a map.

    Returns:
        `str`: SHA-256 of questions and replies in their order, 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for scenario in scenarios:
        digest.update(json.dumps([scenario.question, dict(scenario.replies)], ensure_ascii=False).encode())
    return digest.hexdigest()


def _read(path: Path) -> list[Scenario]:
    scenarios: list[Scenario] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            loaded: Any = json.loads(line, object_pairs_hook=_without_repeats)
        except NeVAError as error:
            raise NeVAError(f"{where}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise NeVAError(f"{where}: not valid JSON ({error}).") from error
        if not isinstance(loaded, dict):
            raise NeVAError(f"{where}: expected a JSON object with `question` and `replies`.")
        unknown = sorted(set(loaded) - _FIELDS)
        missing = sorted({"question", "replies"} - set(loaded))
        if unknown or missing:
            wrong = f"unknown field {unknown[0]!r}" if unknown else f"missing field {missing[0]!r}"
            raise NeVAError(f"{where}: {wrong}; a scenario has the fields {sorted(_FIELDS)}.")
        try:
            scenario = Scenario(**loaded)
        except NeVAError as error:
            raise NeVAError(f"{where}: {error}") from error
        if scenario.id and scenario.id in seen:
            raise NeVAError(f"{where}: the id {scenario.id!r} stands in line {seen[scenario.id]} already.")
        seen[scenario.id] = number
        scenarios.append(scenario)
    return scenarios


def _lines(path: Path) -> list[str]:
    try:
        # Not splitlines(), which also cuts at characters that may stand inside of a JSON text, such as U+2028.
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise NeVAError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict; a key that stands twice would silently lose what stood there first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise NeVAError(f"the key {next(key for key in keys if keys.count(key) > 1)!r:.80} stands twice.")
    return found


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise NeVAError(f"`limit` must be at least 1, got {limit}.")


def _check_text(text: object, what: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise NeVAError(f"{what} must be some text, got {text!r:.80}.")
    if len(text) > MAX_TEXT:
        raise NeVAError(f"{what} has {len(text)} characters, more than {MAX_TEXT}.")
