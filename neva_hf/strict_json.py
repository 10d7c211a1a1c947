"""JSON from strangers: read so that nothing in it is lost, silently repaired, or larger than was asked for.

Python's own reader keeps the last of several equal keys, takes `NaN`, turns `1e999` into infinity, and lets a few
megabytes of brackets become gigabytes of lists. Here each of these is refused before or while the text is read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import NeVAError

MAX_DEPTH = 32
MAX_ITEMS = 500_000
_SHOWN = 80


def read_json_object(path: str | os.PathLike[str], max_bytes: int) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Args:
        path (`str` or `os.PathLike`): The file.
        max_bytes (`int`): How large it may be; a larger one is not opened.

    Returns:
        `dict[str, Any]`: What it holds.

    Raises:
        `NeVAError`: If it cannot be read, is too large, or is no JSON object; see [`parse_json_object`].
    """
    path = Path(path)
    try:
        if path.stat().st_size > max_bytes:
            raise NeVAError(f"{path.name} is larger than {max_bytes >> 20} MiB; that is no config of a neuron map.")
        with path.open("rb") as file:
            # (one byte more than allowed, should the file have grown since)
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise NeVAError(
            f"{path.name} cannot be read ({error.strerror}): check the path and its permissions."
        ) from error
    if len(raw) > max_bytes:
        raise NeVAError(f"{path.name} is larger than {max_bytes >> 20} MiB; that is no config of a neuron map.")
    return parse_json_object(raw, path.name)


def parse_json_object(raw: bytes, name: str) -> dict[str, Any]:
    """Parses one JSON object, strictly.

    Args:
        raw (`bytes`): UTF-8 text.
        name (`str`): What to call it in messages.

    Returns:
        `dict[str, Any]`: What it holds.

    Raises:
        `NeVAError`: For text that is not JSON, another kind of value, equal keys in one object, numbers that are not
            finite, halves of characters, and what is nested too deeply or has too many parts.

    Example:

    ```py
    >>> from neva_hf.strict_json import parse_json_object
    >>> parse_json_object(b'{"values": ["power"]}', "adapter_config.json")
    {'values': ['power']}
    ```
    """
    # Every part of an array or object stands after one of these signs. (In texts they count too; the limit is far.)
    if sum(raw.count(sign) for sign in (b",", b":", b"[", b"{")) > MAX_ITEMS:
        raise NeVAError(f"{name} has more than {MAX_ITEMS} parts; that is no neuron map.")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise NeVAError(f"{name} has {twice!r:.{_SHOWN}} more than once in one object; the neuron map is damaged.")
        return found

    def finite(text: str) -> float:
        number = float(text)
        if not math.isfinite(number):
            raise NeVAError(
                f"{name} holds the number {text:.{_SHOWN}}, which is not finite; the neuron map is damaged."
            )
        return number

    try:
        loaded = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except NeVAError:
        raise
    except (ValueError, RecursionError) as error:
        raise NeVAError(f"{name} is not valid JSON ({error}); the neuron map is damaged.") from error
    if not isinstance(loaded, Mapping):
        raise NeVAError(f"{name} must hold a JSON object, got {type(loaded).__name__}.")
    check_plain(loaded, name)
    return dict(loaded)


def check_plain(data: Any, name: str) -> None:
    """Refuses data that JSON could not hold, or not well.

    Args:
        data (`Any`): What is to be written, or was read.
        name (`str`): What to call it in messages.

    Raises:
        `NeVAError`: For keys that are no text, values of other types than JSON's, halves of characters, more than 32
            levels, and more than 500,000 parts.
    """
    waiting, parts = [(data, 0)], 0
    while waiting:
        item, depth = waiting.pop()
        parts += 1
        if depth > MAX_DEPTH:
            raise NeVAError(f"{name} is nested more than {MAX_DEPTH} levels deep; that is no neuron map.")
        if parts > MAX_ITEMS:
            raise NeVAError(f"{name} has more than {MAX_ITEMS} parts; that is no neuron map.")
        if isinstance(item, Mapping):
            for key, value in item.items():
                if not isinstance(key, str):
                    raise NeVAError(f"{name} has the key {key!r:.{_SHOWN}}, which is no text.")
                _check_text(key, name)
                waiting.append((value, depth + 1))
        elif isinstance(item, (list, tuple)):
            waiting += [(value, depth + 1) for value in item]
        elif isinstance(item, str):
            _check_text(item, name)
        elif item is not None and not isinstance(item, (bool, int, float)):
            raise NeVAError(f"{name} holds a {type(item).__name__}, which JSON cannot hold: use text or numbers.")


def _check_text(text: str, name: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise NeVAError(f"{name} holds {text!r:.{_SHOWN}}, which is not valid Unicode text.") from error
