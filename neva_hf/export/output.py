"""Putting an export in place: whole or not at all, and never over something else by accident."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neva_hf.errors import NeVAError

from .result import NOTE_NAME


def check_output_folder(output: str | os.PathLike[str], force: bool) -> Path:
    """Refuses a folder that an export may not be written to; cheap, so that it is said before the work.

    Args:
        output (`str` or `os.PathLike`): The folder.
        force (`bool`): Whether an earlier export there may be replaced.

    Returns:
        `pathlib.Path`: The folder, absolute.

    Raises:
        `NeVAError`: If it is a file, holds an export and `force` is not set, or holds anything else.
    """
    folder = Path(output).expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise NeVAError(f"{output} is a file; name a folder for the export.")
    if not folder.exists() or not any(folder.iterdir()):
        return folder
    if not (folder / NOTE_NAME).is_file():
        raise NeVAError(
            f"{output} holds other things than an export ({sorted(item.name for item in folder.iterdir())[0]!r}, for "
            f"example; an export has a {NOTE_NAME}), so it is not replaced. Name another folder, or empty this one."
        )
    if not force:
        raise NeVAError(f"There is an export in {output} already. Replace it with force (--force), or name another.")
    return folder


def check_output_file(output: str | os.PathLike[str], suffix: str, force: bool) -> Path:
    """Refuses a file that an export may not be written to.

    Args:
        output (`str` or `os.PathLike`): The file.
        suffix (`str`): How its name has to end, such as `".gguf"`.
        force (`bool`): Whether a file there may be replaced.

    Returns:
        `pathlib.Path`: The file, absolute.

    Raises:
        `NeVAError`: If it is a folder, has another ending, or is there and `force` is not set.
    """
    file = Path(output).expanduser().absolute()
    if file.is_dir():
        raise NeVAError(f"{output} is a folder; name a file that ends in {suffix} for the export.")
    if file.suffix.lower() != suffix:
        raise NeVAError(f"{output} must end in {suffix}, as the export is one such file.")
    if file.exists() and not force:
        raise NeVAError(f"There is a file {output} already. Replace it with force (--force), or name another.")
    return file


@contextmanager
def new_folder(folder: Path, force: bool) -> Iterator[Path]:
    """A hidden folder beside the wanted one, that takes its place when the block ends without an error.

    Args:
        folder (`pathlib.Path`): What [`check_output_folder`] returned.
        force (`bool`): Whether an earlier export there is replaced.

    Yields:
        `pathlib.Path`: Where to write.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished, old = (_beside(folder, word) for word in ("unfinished", "replaced"))
    unfinished.mkdir()
    try:
        yield unfinished
        _readable_like_others(unfinished)
        # Once more, since something may have come meanwhile.
        check_output_folder(folder, force)
        if folder.exists():
            os.rename(folder, old)
        try:
            os.rename(unfinished, folder)
        except BaseException:
            if old.exists():
                os.rename(old, folder)
            raise
    finally:
        for rest in (unfinished, old):
            shutil.rmtree(rest, ignore_errors=True)


@contextmanager
def new_file(file: Path) -> Iterator[Path]:
    """A hidden file beside the wanted one, that takes its place when the block ends without an error.

    Args:
        file (`pathlib.Path`): What [`check_output_file`] returned.

    Yields:
        `pathlib.Path`: Where to write.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _beside(file, "unfinished")
    try:
        yield unfinished
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def _beside(path: Path, word: str) -> Path:
    return path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.{word}"


def _readable_like_others(folder: Path) -> None:
    """safetensors writes for the owner alone; an export is read by whoever may read its other files."""
    mode = (folder / NOTE_NAME).stat().st_mode
    for file in folder.rglob("*.safetensors"):
        file.chmod(mode)
