"""Neuron maps on the Hugging Face Hub: push, and [`pull`] of hub_pull.py.

Invariant: a push is one commit on top of the one that it looked at, or nothing.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from .card import (
    CARD,
    MAX_CARD_BYTES,
    REPORT,
    REPORT_FOLDERS,
    CardOptions,
    Report,
    card_of,
    local_card,
    local_report,
    make_card,
    merge,
    report_of,
)
from .card_text import is_repo_id
from .errors import NeVAError
from .evaluation.kept import map_fingerprint
from .hub_contents import MAP_FILES, MAX_REPORT_BYTES, beside, is_beside
from .hub_errors import TransportError, explained, hub_errors, is_transient
from .hub_files import fetch
from .hub_pull import pull
from .neuron_map import NeuronMap

__all__ = ["pull", "push_to_hub"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_ATTEMPTS = 5
_WAIT_SECONDS = 1.0


@dataclass(frozen=True)
class _Target:
    """Where a push goes, and how."""

    api: HfApi
    repo_id: str
    revision: str | None
    subfolder: str | None
    create_pr: bool
    token: str | bool | None

    def path(self, name: str) -> str:
        """A file's path in the repository."""
        return f"{self.subfolder}/{name}" if self.subfolder else name

    def read(self, name: str, commit: str, most: int) -> Path:
        """A file of the repository."""
        hub = {"token": self.token, "cache_dir": None, "local_files_only": False}
        return fetch(self.repo_id, name, most, revision=commit, subfolder=self.subfolder, hub=hub)


def push_to_hub(
    source: NeuronMap | str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    base_model: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    card: bool = True,
) -> CommitInfo:
    """Puts a neuron map on the Hub, with its card, its report and its pictures, in one commit.

    The card is written from the map and its report. What others wrote into it, here or on the Hub, stays; see card.py. A
    connection that is lost is tried again, and a commit that somebody else made meanwhile is looked at first.

    Args:
        source ([`NeuronMap`], `str` or `os.PathLike`):
            The map, or its folder. From a folder also go its report (`report.json`, `report.md`, in it or in its folder
            `report`), pictures, a license and a notice; nothing else.
        repo_id (`str`): The repository, such as `"user/neva-map"`; made if it is not there.
        private (`bool`, *optional*): Whether only you see it; what your account says when `None`.
        revision (`str`, *optional*): A branch, made if it is not there; main when `None`.
        subfolder (`str`, *optional*): Where in the repository; its top when `None`.
        commit_message (`str`, *optional*): What is new.
        create_pr (`bool`): Whether to ask the owners by a pull request.
        token (`str` or `bool`, *optional*): A Hub token that may write; the one that you logged in with when `None`.
        base_model (`str`, *optional*): The Hub id of the base model, where the map names a folder of yours.
        license (`str`, *optional*): Such as `"cc-by-4.0"`, for the card.
        datasets (`Sequence[str]`): Repositories of the scenarios, for the card.
        card (`bool`): Whether to write the card; without, a `README.md` in the folder goes as it is.

    Returns:
        `huggingface_hub.CommitInfo`: The commit, a `str` with its address (`oid`, `pr_url`).

    Raises:
        `NeVAError`: If the map is not sound or cannot be pushed; no commit was made then.

    Example:

    ```py
    >>> from neva_hf.hub import push_to_hub
    >>> push_to_hub("my-map", "user/neva-map", private=True)  # doctest: +SKIP
    ```
    """
    with tempfile.TemporaryDirectory(prefix="neva-push-") as temporary:
        if isinstance(source, NeuronMap):
            neuron_map, folder = source, Path(temporary)
        else:
            neuron_map, folder = NeuronMap.from_pretrained(_existing(source)), Path(source)
        named = replace(neuron_map.config, base_model_name_or_path=base_model or neuron_map.base_model)
        _check_base_name(named.base_model_name_or_path)
        options = CardOptions(repo_id, _checked_subfolder(subfolder), license, tuple(datasets))
        files = {name: folder / name for name in beside(folder)}
        changed = NeuronMap(named, neuron_map.modules)
        if folder == Path(temporary) or base_model is not None:
            changed.save_pretrained(temporary)
            folder_of_map = Path(temporary)
        else:
            folder_of_map = folder
        files |= {name: folder_of_map / name for name in MAP_FILES}
        report = local_report(folder)
        here = local_card(folder)
        message = (
            commit_message or f"Neuron map of {changed.base_model or 'a base model'}: {len(changed.values)} values"
        )
        with hub_errors(f"Nothing was pushed to {repo_id!r:.120}", writing=True):
            target = _again(lambda: _target(repo_id, private, revision, options.subfolder, create_pr, token))
            told = replace(options, repo_id=target.repo_id) if card else None
            return _again(
                lambda: _push(target, changed, files, report, here, told, message), after_lost_answers=not create_pr
            )


def _push(
    target: _Target,
    neuron_map: NeuronMap,
    files: dict[str, Path],
    report: Report | None,
    here: str | None,
    options: CardOptions | None,
    message: str,
) -> CommitInfo:
    """Commits on top of what is there."""
    head, there = _head(target)
    written = {name: path for name, path in files.items() if name != CARD or options is None}
    added: list[Any] = [CommitOperationAdd(target.path(name), path) for name, path in written.items()]
    stale: list[str] = []
    if options is not None:
        told, stale = (report, []) if report is not None else _remote_report(target, neuron_map, head, there)
        theirs = target.read(CARD, head, MAX_CARD_BYTES) if target.path(CARD) in there else None
        existing = merge(here, None if theirs is None else card_of(theirs))
        added.append(CommitOperationAdd(target.path(CARD), make_card(neuron_map, told, existing, options).encode()))
    removed = [CommitOperationDelete(name) for name in stale if name not in {target.path(one) for one in files}]
    return target.api.create_commit(
        target.repo_id,
        [*added, *removed],
        commit_message=message,
        revision=target.revision,
        create_pr=target.create_pr,
        # Somebody else's commit in between is refused by the Hub, and looked at next time.
        parent_commit=head,
        token=target.token,
    )


def _again(act: Callable[[], _T], after_lost_answers: bool = True) -> _T:
    """Does something that may be done twice, again where the connection was lost or somebody else was quicker.

    Args:
        act (`Callable`): What to do.
        after_lost_answers (`bool`): Also where the answer was lost, so that it may have been done: a commit that is there
            already is not made twice, but a second pull request would be opened.
    """
    for attempt in range(1, _ATTEMPTS):
        try:
            return act()
        except (TransportError, OSError, NeVAError) as error:
            cause = error.__cause__ if isinstance(error, NeVAError) else error
            answered = isinstance(cause, HfHubHTTPError)
            if cause is None or not (is_transient(cause) or _is_conflict(cause)):
                raise
            if not answered and not after_lost_answers:
                raise
            logger.info("Trying the Hub again: %s", explained(cause, "last time", writing=True))
        time.sleep(_WAIT_SECONDS * 2 ** (attempt - 1))
    return act()


def _target(
    repo_id: str,
    private: bool | None,
    revision: str | None,
    subfolder: str | None,
    create_pr: bool,
    token: str | bool | None,
) -> _Target:
    """Makes the repository and the branch where they are not there."""
    api = HfApi(library_name="neva-hf")
    made = api.create_repo(repo_id, private=private, exist_ok=True, token=token)
    repo_id = made.repo_id
    # An existing repository keeps its visibility, whatever was asked for: what should be private must not become public.
    if private is not None and bool(api.model_info(repo_id, token=token).private) != private:
        raise NeVAError(
            f"{repo_id} is there already and is {'public' if private else 'private'}; nothing was pushed. Change its "
            "visibility in its settings on the Hub, choose another name, or leave out private."
        )
    named = revision is not None and revision != constants.DEFAULT_REVISION and not revision.startswith("refs/")
    if revision is not None and named and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True, token=token)
    return _Target(api, repo_id, revision, subfolder, create_pr, token)


def _head(target: _Target) -> tuple[str, set[str]]:
    """The commit to build on, and the files in it."""
    info = target.api.model_info(target.repo_id, revision=target.revision, token=target.token)
    return str(info.sha), {sibling.rfilename for sibling in info.siblings or []}


def _remote_report(
    target: _Target, neuron_map: NeuronMap, head: str, there: set[str]
) -> tuple[Report | None, list[str]]:
    """The report that is in the repository, where it is about this map; else the files of it, which are to go."""
    for prefix in REPORT_FOLDERS:
        if target.path(prefix + REPORT) not in there:
            continue
        pictures = {
            name.removeprefix(target.path(prefix))
            for name in there
            if name.startswith(target.path(prefix)) and is_beside(name)
        }
        try:
            numbers = report_of(target.read(prefix + REPORT, head, MAX_REPORT_BYTES))
            told = numbers.get("map")
            if isinstance(told, dict) and told.get("fingerprint") == map_fingerprint(neuron_map):
                return Report(numbers, prefix, pictures), []
            drawn = [name for name in numbers.get("pictures") or {} if name in pictures]
        except NeVAError as error:
            if error.__cause__ is not None and is_transient(error.__cause__):
                raise
            drawn = []
        old = [target.path(prefix + name) for name in (REPORT, "report.md", *drawn)]
        return None, [name for name in old if name in there]
    return None, []


def _existing(source: str | os.PathLike[str]) -> Path:
    if not Path(source).is_dir():
        raise NeVAError(f"There is no folder {source}: name the folder of the neuron map to push.")
    return Path(source)


def _is_conflict(error: BaseException) -> bool:
    return isinstance(error, HfHubHTTPError) and error.response.status_code in (409, 412)


def _checked_subfolder(subfolder: str | None) -> str | None:
    if subfolder is None or not subfolder.strip("/"):
        return None
    name = subfolder.strip("/")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)*", name):
        raise NeVAError(
            f"{subfolder!r:.120} cannot be a folder of a repository: use letters, digits, '-', '_', '.', and '/'."
        )
    return name


def _check_base_name(name: str | None) -> None:
    if name is not None and (not is_repo_id(name) or Path(name).exists()):
        raise NeVAError(
            f"The map names {name!r:.120} as its base model, which others do not have. Say what it is called on the Hub: "
            "base_model='org/model', --base-model org/model."
        )
