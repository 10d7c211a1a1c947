"""Which map the page shows: the published one, one that its owner names, or a visitor's from the Hub.

Invariant: a visitor names a repository, never a path, and it is read without a token, weighed before it is fetched,
checked by the safe loader, and leaves nothing on the disk.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn

from neva_hf.architectures import check_base
from neva_hf.card_parts import value_system
from neva_hf.card_text import is_repo_id
from neva_hf.errors import NeVAError
from neva_hf.hub_files import COMMIT, fetch
from neva_hf.map_files import MAX_CONFIG_BYTES
from neva_hf.neuron_map import NeuronMap
from neva_hf.projection import layer_sizes
from neva_hf.values import Value, ValueSystem, available_value_systems, load_value_system

from .limits import Limits

DEFAULT_MAP = "smollm2-135m-instruct-schwartz"

# Dials of a map that does not say how far it stays fluent.
_UNKNOWN_RANGE = (-2.0, 2.0)
_MOST_REACH = 8.0
_MOST_LABEL, _MOST_DEFINITION = 60, 400
_ADDRESS = re.compile(r"https?://(www\.)?(huggingface\.co|hf\.co)/")


def default_map() -> Path:
    """The folder of the map that the page shows when none is named.

    Returns:
        `pathlib.Path`: In the package, or in the checkout around it.

    Raises:
        `NeVAError`: If it came with neither.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "maps" / DEFAULT_MAP, package.parent / "model_cards" / DEFAULT_MAP):
        if (folder / CONFIG_NAME).is_file():
            return folder
    raise NeVAError(
        f"The map {DEFAULT_MAP} did not come with this installation. Name a map: its folder, or a repository on the Hub."
    )


def repo_of(text: str) -> str:
    """The repository that a visitor names, by its id or the address of its page.

    Args:
        text (`str`): What was typed.

    Returns:
        `str`: `user/name`.

    Raises:
        `NeVAError`: If it is neither.

    Example:

    ```py
    >>> from neva_hf.space.maps import repo_of
    >>> repo_of("https://huggingface.co/user/neva-map/")
    'user/neva-map'
    ```
    """
    name = _ADDRESS.sub("", text.strip(), count=1).rstrip("/") if len(text) < 300 else ""
    if name.count("/") != 1 or not is_repo_id(name):
        raise NeVAError("This is no repository on the Hugging Face Hub. Write it as user/name.")
    return name


def map_of_visitor(repo_id: str, limits: Limits) -> NeuronMap:
    """Reads a stranger's map from the Hub.

    Args:
        repo_id (`str`): From [`repo_of`].
        limits ([`Limits`]): How large it may be.

    Returns:
        [`NeuronMap`]: The map, checked.

    Raises:
        `NeVAError`: If it cannot be had, is too large or not sound.
    """
    # Of the cache nothing would ever be removed, and a local folder of that name is not what was asked for. The page's
    # own token would open its owner's private repositories to everybody.
    with tempfile.TemporaryDirectory(prefix="neva-space-") as cache:
        hub: dict[str, Any] = {"token": False, "cache_dir": cache, "local_files_only": False}
        with _told_to_visitors(repo_id):
            config = fetch(repo_id, CONFIG_NAME, min(limits.map_bytes, MAX_CONFIG_BYTES), hub=hub)
            commit = config.parent.name if COMMIT.fullmatch(config.parent.name) else None
            fetch(repo_id, SAFETENSORS_WEIGHTS_NAME, limits.map_bytes, revision=commit, hub=hub)
        found = NeuronMap.from_pretrained(config.parent)
    if len(found.values) > limits.values:
        raise NeVAError(f"The map {repo_id} has {len(found.values)} values; this page shows {limits.values} at most.")
    return found


@contextmanager
def _told_to_visitors(repo_id: str) -> Iterator[None]:
    """What a visitor can do nothing about (tokens, logging in) is not spoken of."""
    try:
        yield
    except NeVAError as error:
        cause = error.__cause__
        if isinstance(cause, RepositoryNotFoundError):
            raise NeVAError(
                f"The Hub has no public repository {repo_id}. Check the spelling; private and gated ones cannot be "
                "read here."
            ) from error
        if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
            raise NeVAError(
                f"The repository {repo_id} holds no neuron map: {CONFIG_NAME} or {SAFETENSORS_WEIGHTS_NAME} is missing at "
                "its top."
            ) from error
        raise


def short_path(where: str) -> str:
    """A path as it is written from the working directory, if it lies in there."""
    path = Path(where)
    here = path.exists() and path.is_absolute() and path.is_relative_to(Path.cwd())
    return path.relative_to(Path.cwd()).as_posix() if here else where


def check_fit(base: nn.Module, neuron_map: NeuronMap, what: str) -> None:
    """Refuses a map that is not for this base model. No weight is read.

    Args:
        base (`nn.Module`): The base model.
        neuron_map ([`NeuronMap`]): The map.
        what (`str`): What the page calls the two, for the message.

    Raises:
        `NeVAError`: If it does not fit.
    """
    try:
        check_base(base, neuron_map.config.base, list(neuron_map.modules))
        for name, edits in neuron_map.modules.items():
            size, last = layer_sizes(base.get_submodule(name))[0], int(edits.index.max())
            if last >= size:
                raise NeVAError(f"it edits neuron {last} of {name!r:.120}, which has only {size}.")
    except NeVAError as error:
        raise NeVAError(f"{what}: {error}") from error


def system_of(neuron_map: NeuronMap) -> ValueSystem:
    """What the values of a map mean: as it says itself, as a shipped system does, or nothing but their names.

    Args:
        neuron_map ([`NeuronMap`]): The map.

    Returns:
        [`ValueSystem`]: With at least the map's values. Its texts are short, but a stranger's: escape them.
    """
    own = value_system(neuron_map)
    shipped = sorted(available_value_systems(), key=lambda name: name != "schwartz10")
    for system in ([own] if own is not None else []) + [load_value_system(name) for name in shipped]:
        if all(value in system for value in neuron_map.values):
            return replace(system, values=tuple(_short(value) for value in system), label=_cut(system.label))
    values = tuple(
        Value(name, _cut(name.replace("_", " ").capitalize()), "The map does not say what it means.")
        for name in neuron_map.values
    )
    return ValueSystem("values_of_this_map", "Values of this map", "Named by the map alone.", values)


def ranges_of(neuron_map: NeuronMap) -> dict[str, tuple[float, float]]:
    """The fluent range of every value of a map, within what the page can show."""
    found = {value: neuron_map.config.ranges.get(value, _UNKNOWN_RANGE) for value in neuron_map.values}
    return {value: (max(low, -_MOST_REACH), min(high, _MOST_REACH)) for value, (low, high) in found.items()}


def reach_of(ranges: Sequence[tuple[float, float]]) -> float:
    """How far dials may be turned at all: somewhat beyond the widest fluent range.

    Example:

    ```py
    >>> from neva_hf.space.maps import reach_of
    >>> reach_of([(-2.0, 2.5), (-2.9, 2.4)])
    4.0
    ```
    """
    widest = max(max(-low, high) for low, high in ranges)
    return min(_MOST_REACH, max(2.0, math.ceil(2.5 * widest) / 2))


def _short(value: Value) -> Value:
    return replace(value, label=_cut(value.label), definition=_cut(value.definition, _MOST_DEFINITION))


def _cut(text: str, most: int = _MOST_LABEL) -> str:
    """A text in one line, without signs that nobody sees."""
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split()) or "?"
    return line if len(line) <= most else line[: most - 1] + "…"
