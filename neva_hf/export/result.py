"""What an export leaves behind: where it is, and a note of where it came from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from neva_hf._version import __version__

from .check import Check

NOTE_NAME = "neva_export.json"
"""The file that says in a folder what was exported; its presence is what lets `force` replace the folder."""


@dataclass(frozen=True)
class Export:
    """An export that was checked and written.

    Args:
        kind (`str`): `"stock"`, `"merge"` or `"gguf"`.
        path (`pathlib.Path`): The folder, or the file of a control vector.
        strengths (`dict[str, float]`): The strengths that it holds, without those of 0.
        check ([`Check`]): How near it comes to the live model.
        adapter (`pathlib.Path`, *optional*): The LoRA adapter that goes with a control vector, for maps with gains.
    """

    kind: str
    path: Path
    strengths: dict[str, float]
    check: Check
    adapter: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "kind": self.kind,
            "path": str(self.path),
            "lora_adapter": None if self.adapter is None else str(self.adapter),
            "strengths": self.strengths,
            "largest_logit_difference": self.check.difference,
            "largest_logit_change_of_the_edit": self.check.effect,
            "tolerance": self.check.tolerance,
            "tokens_compared": self.check.tokens,
        }


@dataclass(frozen=True)
class Origin:
    """Where an export came from.

    Args:
        source (`str`, *optional*): The neuron map: a Hub repository or a folder.
        base_model (`str`, *optional*): The base model that it was made from.
        strengths (`dict[str, float]`): Value -> strength.
    """

    source: str | None
    base_model: str | None
    strengths: dict[str, float]

    def to_dict(self, kind: str) -> dict[str, Any]:
        """As JSON can hold it. Folders are told by their names alone, as the export may be shared."""
        return {
            "made_by": f"neva-hf {__version__}",
            "kind": kind,
            "neuron_map": _told(self.source),
            "base_model": _told(self.base_model),
            "strengths": self.strengths,
        }


def write_note(folder: Path, kind: str, origin: Origin, check: Check) -> None:
    """Writes `neva_export.json`.

    Args:
        folder (`pathlib.Path`): Where to.
        kind (`str`): What kind of export it is.
        origin ([`Origin`]): Where it came from.
        check ([`Check`]): How near it comes to the live model.
    """
    numbers = {"largest_logit_difference": check.difference, "largest_logit_change_of_the_edit": check.effect}
    text = json.dumps(origin.to_dict(kind) | numbers, indent=2)
    (folder / NOTE_NAME).write_text(text + "\n", encoding="utf-8")


def write_card(folder: Path, title: str, use: str, data: dict[str, Any], origin: Origin, check: Check) -> None:
    """Writes a short README.md with the metadata of the Hub.

    Args:
        folder (`pathlib.Path`): Where to.
        title (`str`): Its heading.
        use (`str`): How to use the export, in Markdown.
        data (`dict`): Metadata besides the base model and tags.
        origin ([`Origin`]): Where the export came from.
        check ([`Check`]): How near it comes to the live model.
    """
    base = origin.base_model if is_repo_id(origin.base_model) else None
    metadata = ModelCardData(
        base_model=base, pipeline_tag="text-generation", tags=["neva", "steering", "values"], **data
    )
    rows = "\n".join(f"| {name} | {strength:+g} |" for name, strength in origin.strengths.items())
    text = f"""---
{metadata.to_yaml()}
---

# {title}

{use}

## Where it came from

The neuron map {as_code(_told(origin.source))} on the base model {as_code(_told(origin.base_model))}, at these fixed
strengths (1 is the map's calibrated unit):

| value | strength |
|---|---|
{rows}

On {check.tokens} tokens of test prompts, the largest difference of a logit from the live edit was {check.difference:.2g};
the edit itself moves logits by up to {check.effect:.2g}. Made by neva-hf {__version__}.

The edit makes answers lean towards or away from values. It does not make them true, safe or fair, and side effects on
other values are likely: see the card of the neuron map. The base model's licence and terms apply.
"""
    ModelCard(text, ignore_metadata_errors=True).save(folder / "README.md")


def is_repo_id(name: str | None) -> bool:
    """Whether a text can be the name of a repository `user/name` on the Hub, and is no folder here."""
    if not name or "/" not in name or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def as_code(text: str) -> str:
    """A text from elsewhere as a code span, which can hold no markup of its own.

    Example:

    ```py
    >>> from neva_hf.export.result import as_code
    >>> as_code("a`b\\n# c")
    '`a b # c`'
    ```
    """
    shown = "".join(sign if sign.isprintable() and sign != "`" else " " for sign in text)
    return f"`{' '.join(shown.split())[:200] or '?'}`"


def _told(name: str | None) -> str:
    if name is None:
        return "without a name"
    return name if is_repo_id(name) else Path(name).name or "without a name"
