"""A report as files: `report.json`, `report.md` and pictures, all from the same numbers.

The JSON (`schema` "neva-hf/evaluation/1"; a number is `[estimate, low, high]`, a 95% interval, with `null` for what is not
defined or has no end; matrices are lists of rows):

| key | what |
|---|---|
| `model`, `map`, `scenarios`, `fitted_on`, `target_kl`, `bootstrap`, `versions` | where it comes from: names, fingerprints, hashes, seeds |
| `values`, `observed`, `value_system`, `strengths` | what was dialled and watched |
| `methods` -> name -> `notes`, `scalable` | what the method says about itself, such as the layer that it chose |
| `methods` -> name -> `strengths` -> `"+1"` | `target`, `csr_before`, `csr`, `csr_change`, `nlr`, `nlr_csr`, `nglr`, `nglr_csr`, `neighbours_share`, `own`, `other`, `own_over_other`, `right_direction`, `forms` |
| ... -> `values` -> value | the same of one value, and its largest leak |
| ... -> `shifts`, `shifts_95`, `csr_shifts` | target x observed, turned round for negative strengths |
| ... -> `choices` | `pairs`, and the share of scenarios in which the first of each wins: `before`, and `after` each target is dialled |
| ... -> `damage` | `kl`, `perplexity_ratio`, of each value too |
| `first_beside` -> name -> strength | the first method's numbers minus that one's, and over them, paired |
| `pairs`, `opposing`, `dose` | of the first method, or `null` |
| `capability` and others | further measurements, by method |
"""  # noqa: E501

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from neva_hf.errors import NeVAError
from neva_hf.values import ValueSystem

from .assembly import SCHEMA
from .markdown import markdown


def write_report(
    report: Mapping[str, Any],
    folder: str | os.PathLike[str],
    *,
    system: ValueSystem | None = None,
    pictures: bool = True,
    tell: Callable[[str], None] = lambda line: None,
) -> Path:
    """Writes a report.

    Args:
        report (`Mapping[str, Any]`): From [`evaluate`].
        folder (`str` or `os.PathLike`): Made if it is not there.
        system ([`ValueSystem`], *optional*): For the labels and the circle in pictures.
        pictures (`bool`): Whether to draw; without matplotlib a line is told instead.
        tell (`Callable[[str], None]`): Gets what is worth a line.

    Returns:
        `Path`: The folder.

    Raises:
        `NeVAError`: If the path is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NeVAError(f"{folder} is a file: name a folder for the report.")
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, str] = {}
    if pictures:
        from .pictures import draw

        drawn = draw(report, folder, system=system, tell=tell)
    _write(folder / "report.md", markdown(report, drawn))
    _write(folder / "report.json", _json({**report, "pictures": drawn}))
    return folder


def read_report(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads `report.json` again.

    Args:
        folder (`str` or `os.PathLike`): The folder, or the file itself.

    Returns:
        `dict[str, Any]`: The report.

    Raises:
        `NeVAError`: If there is none, or it is of another schema.
    """
    path = Path(folder)
    path = path / "report.json" if path.is_dir() else path
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NeVAError(f"There is no report at {path} that can be read: run `neva evaluate` first.") from error
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise NeVAError(
            f"{path} is of the schema {schema!r:.80}, expected {SCHEMA!r}: evaluate again with this version."
        )
    return found


def _json(report: Mapping[str, Any]) -> str:
    """JSON with a line for every list of numbers, not for every number."""
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    # (no string holds a line break, so nothing inside of strings is touched)
    return (
        re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s+\]", lambda found: "[" + re.sub(r"\n\s+", " ", found[1]) + "]", text) + "\n"
    )


def _write(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, never half of one."""
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
