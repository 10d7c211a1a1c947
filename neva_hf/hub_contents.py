"""What goes with a neuron map in a repository, and how large it may be. Anything else is neither pushed nor pulled."""

from __future__ import annotations

import re
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from .card import CARD, MAX_CARD_BYTES, REPORT

MAP_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
MAX_REPORT_BYTES = 64 * 2**20
MAX_PICTURE_BYTES = 16 * 2**20
MAX_FILES = 200

_PATH = re.compile(r"(report/|images/)?[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}")
_KINDS = (".png", ".jpg", ".jpeg", ".webp")
_NAMES = (CARD, REPORT, "report.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "NOTICE.md")


def is_beside(name: str) -> bool:
    """Whether a file goes along with a map.

    Args:
        name (`str`): Its path, as seen from the map.

    Returns:
        `bool`: For the card, the report, pictures, a license and a notice; what runs or unpickles never is one of them.
    """
    last = name.rsplit("/", 1)[-1]
    return bool(_PATH.fullmatch(name)) and (last in _NAMES or last.lower().endswith(_KINDS))


def beside(folder: Path) -> list[str]:
    """What goes along with the map in a folder.

    Args:
        folder (`pathlib.Path`): The map's.

    Returns:
        `list[str]`: Paths in it.
    """
    found = [
        path.relative_to(folder).as_posix()
        for place in (folder, folder / "report", folder / "images")
        if place.is_dir()
        for path in sorted(place.iterdir())
        if path.is_file()
    ]
    return [name for name in found if is_beside(name)][:MAX_FILES]


def most_bytes(name: str) -> int:
    """How large a file beside a map may be."""
    return MAX_CARD_BYTES if name == CARD else MAX_REPORT_BYTES if name.endswith(REPORT) else MAX_PICTURE_BYTES
