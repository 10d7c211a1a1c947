"""Files of a repository on the Hub, or of a folder: looked up, weighed before they are fetched, and of one commit.

A map is two files. Both are always taken from the same commit, and the cache learns what a branch points at only when it
has them both, so neither a push in between nor a lost connection makes a map of two halves.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from .errors import NeVAError
from .hub_errors import TransportError, explained, hub_errors
from .map_files import MAX_CONFIG_BYTES, MAX_TENSOR_BYTES

COMMIT = re.compile(r"[0-9a-f]{40}")
# How often a branch may move while a map is fetched from it.
_MOVES = 5


@dataclass(frozen=True)
class MapFiles:
    """Where the two files of a map are.

    Args:
        config (`pathlib.Path`): Its `adapter_config.json`.
        tensors (`pathlib.Path`): Its `adapter_model.safetensors`.
        commit (`str`, *optional*): The commit on the Hub that both are of.
    """

    config: Path
    tensors: Path
    commit: str | None = None


def find_map(
    where: str | os.PathLike[str], revision: str | None, subfolder: str | None, hub: dict[str, Any]
) -> MapFiles:
    """Finds the files of a neuron map, in a folder or on the Hub (through its cache).

    Args:
        where (`str` or `os.PathLike`): A folder, or the id of a repository.
        revision (`str`, *optional*): Branch, tag or commit.
        subfolder (`str`, *optional*): Where in it the map is.
        hub (`dict[str, Any]`): `token`, `cache_dir` and `local_files_only` of `hf_hub_download`.

    Returns:
        [`MapFiles`]: Both, of one commit.

    Raises:
        `NeVAError`: If there is no map, the Hub does not give it, or its files are too large for one.
    """
    if Path(where).is_dir():
        folder = Path(where, subfolder or "")
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
            if not (folder / name).is_file():
                raise NeVAError(f"There is no neuron map in {folder}: {name} is missing.")
        return MapFiles(folder / CONFIG_NAME, folder / SAFETENSORS_WEIGHTS_NAME)
    if Path(where).exists():
        raise NeVAError(f"{where} is a file; give the folder of a neuron map, or the id of a Hub repository.")
    return find_map_on_hub(str(where), revision, subfolder, hub)


def find_map_on_hub(repo_id: str, revision: str | None, subfolder: str | None, hub: dict[str, Any]) -> MapFiles:
    """Finds the files of a neuron map on the Hub, even where a folder has the repository's name. See [`find_map`]."""
    what = f"No neuron map was found at {repo_id:.120}: there is no such folder, and from the Hub"
    try:
        for _ in range(_MOVES):
            commit = _weigh(repo_id, CONFIG_NAME, MAX_CONFIG_BYTES, revision, subfolder, hub)
            _weigh(repo_id, SAFETENSORS_WEIGHTS_NAME, MAX_TENSOR_BYTES, commit, subfolder, hub)
            tensors = _download(repo_id, SAFETENSORS_WEIGHTS_NAME, commit, subfolder, hub)
            _download(repo_id, CONFIG_NAME, commit, subfolder, hub)
            # Only now by the branch's name, which the cache then knows for the next time without a network.
            config = _download(repo_id, CONFIG_NAME, revision, subfolder, hub)
            if config.parent == tensors.parent:
                return MapFiles(config, tensors, commit)
    except NeVAError:
        raise
    except HFValidationError as error:
        raise NeVAError(
            f"There is no folder {repo_id:.500}, and it cannot be the id of a Hub repository, such as user/name."
        ) from error
    except LocalEntryNotFoundError as error:
        raise explained(error, what) from error
    except EntryNotFoundError as error:
        place = (
            f"in its folder {subfolder!r}" if subfolder else "at its top (a map in a folder of it needs subfolder=)"
        )
        raise NeVAError(
            f"There is no neuron map in the repository {repo_id:.120} {place}: {CONFIG_NAME} or {SAFETENSORS_WEIGHTS_NAME} "
            "is missing."
        ) from error
    except (TransportError, OSError, ValueError, RuntimeError) as error:
        raise explained(error, what) from error
    raise NeVAError(f"{repo_id:.120} is being changed all the time. Try again, or name a commit as revision.")


def fetch(
    repo_id: str,
    name: str,
    most: int,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    hub: dict[str, Any],
) -> Path:
    """A file of a repository, unless it is larger than it may be.

    Args:
        repo_id (`str`): The repository.
        name (`str`): The file, in `subfolder`.
        most (`int`): Bytes.
        revision (`str`, *optional*): Branch, tag or commit.
        subfolder (`str`, *optional*): Where in the repository.
        hub (`dict[str, Any]`): As in [`find_map`].

    Returns:
        `pathlib.Path`: In the cache.

    Raises:
        `NeVAError`: If it is too large, or the Hub does not give it.
    """
    with hub_errors(f"{name} of {repo_id!r:.120} could not be read"):
        commit = _weigh(repo_id, name, most, revision, subfolder, hub)
        return _download(repo_id, name, commit, subfolder, hub)


def _weigh(
    repo_id: str, name: str, most: int, revision: str | None, subfolder: str | None, hub: dict[str, Any]
) -> str:
    """The commit that a revision stands for, after a look at the size of a file in it."""
    found: Any = hf_hub_download(repo_id, name, subfolder=subfolder, revision=revision, dry_run=True, **hub)
    if found.file_size is not None and found.file_size > most:
        raise NeVAError(
            f"{name} of {repo_id!r:.120} has {found.file_size:,} bytes, and may have at most {most:,}; it was not fetched."
        )
    return str(found.commit_hash)


def _download(repo_id: str, name: str, revision: str | None, subfolder: str | None, hub: dict[str, Any]) -> Path:
    return Path(hf_hub_download(repo_id, name, subfolder=subfolder, revision=revision, **hub))
