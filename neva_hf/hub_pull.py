"""Neuron maps from the Hugging Face Hub into a folder.

Invariant: a whole, checked map of one commit is put in place, or nothing.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from .card import CARD
from .card_text import is_repo_id
from .errors import NeVAError
from .hub_contents import MAP_FILES, MAX_FILES, beside, is_beside, most_bytes
from .hub_errors import TransportError, explained, hub_errors, is_transient
from .hub_files import fetch, find_map_on_hub
from .neuron_map import NeuronMap


def pull(
    repo_id: str,
    folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    overwrite: bool = False,
) -> NeuronMap:
    """Fetches a map from the Hub into a folder, with its card, report and pictures, and nothing else that is there.

    Args:
        repo_id (`str`): The repository.
        folder (`str` or `os.PathLike`): Made if it is not there.
        revision (`str`, *optional*): Branch, tag or commit.
        subfolder (`str`, *optional*): Where in the repository the map is.
        token (`str` or `bool`, *optional*): A Hub token, for private repositories.
        cache_dir (`str` or `os.PathLike`, *optional*): In place of the Hub's cache folder.
        local_files_only (`bool`): Whether to use the cache alone.
        overwrite (`bool`): Whether to replace what is in the folder.

    Returns:
        [`NeuronMap`]: The map, checked.

    Raises:
        `NeVAError`: If it cannot be had or is not sound, or the folder holds a map; the folder is then as it was.
    """
    folder = Path(folder)
    if folder.is_file():
        raise NeVAError(f"{folder} is a file; give a folder to pull the neuron map into.")
    if not is_repo_id(repo_id):
        raise NeVAError(f"{repo_id!r:.120} cannot be the id of a repository on the Hub. Write it as user/name.")
    taken = [name for name in (*MAP_FILES, CARD) if (folder / name).exists()]
    if taken and not overwrite:
        raise NeVAError(
            f"There is a {taken[0]} in {folder} already; name another folder, or replace it with --overwrite."
        )
    hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    found = find_map_on_hub(repo_id, revision, subfolder, hub)
    neuron_map = NeuronMap.from_pretrained(found.config.parent)
    commit = found.commit
    others = _listed(repo_id, commit, subfolder, hub, found.config.parent)
    with hub_errors(f"{repo_id!r:.120} could not be pulled"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".neva-", dir=folder) as unfinished:
            for name in others:
                fetched = fetch(repo_id, name, most_bytes(name), revision=commit, subfolder=subfolder, hub=hub)
                _copy(fetched, Path(unfinished, name))
            for name, path in zip(MAP_FILES, (found.config, found.tensors), strict=True):
                _copy(path, Path(unfinished, name))
            # The config goes first and comes last: whoever looks in between finds no map rather than half of one.
            (folder / CONFIG_NAME).unlink(missing_ok=True)
            for name in (*others, SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME):
                (folder / name).parent.mkdir(exist_ok=True)
                os.replace(Path(unfinished, name), folder / name)
    return neuron_map


def _listed(repo_id: str, commit: str | None, subfolder: str | None, hub: dict[str, Any], cached: Path) -> list[str]:
    """What a repository has beside its map; of the cache, where the Hub is not to be asked or does not answer."""
    if hub["local_files_only"] or constants.HF_HUB_OFFLINE:
        return beside(cached)
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    try:
        info = HfApi().model_info(repo_id, revision=commit, token=hub["token"])
    except (TransportError, OSError) as error:
        if is_transient(error):
            return beside(cached)
        raise explained(error, f"{repo_id!r:.120} could not be pulled") from error
    names = sorted(
        one.rfilename.removeprefix(prefix) for one in info.siblings or [] if one.rfilename.startswith(prefix)
    )
    return [name for name in names if is_beside(name)][:MAX_FILES]


def _copy(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, to)
