"""A card that was there already: its metadata and body, and one card from two that were edited apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from .card_text import fingerprint, free_text, has_parts
from .errors import NeVAError

_MARK = re.compile(r"<!-- neva:free-text ([0-9a-f]{16}) -->")
# What PEFT's save_pretrained leaves for people to fill in.
_PEFT_BLANK = ("# Model Card for Model ID", "[More Information Needed]")
_LISTS = ("tags", "datasets")


def split(text: str | None) -> tuple[dict[str, Any], str]:
    """Metadata and body of a card.

    Args:
        text (`str`, *optional*): The card; one that was only begun by PEFT counts as none.

    Returns:
        `tuple[dict[str, Any], str]`: Both empty for none.

    Raises:
        `NeVAError`: If the metadata is no YAML.
    """
    if not text or not text.strip():
        return {}, ""
    text = text.removeprefix("\ufeff")
    block = REGEX_YAML_BLOCK.search(text)
    body = text[block.end() :] if block else text
    try:
        found = yaml.safe_load(block[2]) if block else {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = " ".join(str(error).split())[:150]
        raise NeVAError(f"The metadata at the top of README.md cannot be read ({line}): mend or remove it.") from error
    if found is not None and not (isinstance(found, dict) and all(isinstance(key, str) for key in found)):
        raise NeVAError("The metadata at the top of README.md must be names with values (YAML): mend or remove it.")
    return found or {}, "" if all(blank in body for blank in _PEFT_BLANK) else body.strip()


def merge(local: str | None, remote: str | None) -> str | None:
    """One card from the one here and the one on the Hub, where both may have been edited since the last push.

    Every push marks the card with the fingerprint of the owner's text in it, so it can be told who changed it since. Where
    only one side did, that side is taken; metadata is taken from both.

    Args:
        local (`str`, *optional*): The card here.
        remote (`str`, *optional*): The card in the repository.

    Returns:
        `str` or `None`: What to write anew.

    Raises:
        `NeVAError`: If both sides were edited differently: neither edit is thrown away.
    """
    (ours, here), (theirs, there) = split(local), split(remote)
    if not here or not there:
        body = here or there
    else:
        pushed, mine, yours = _mark(there), fingerprint(free_text(here)), fingerprint(free_text(there))
        untouched_here = mine in (pushed, _mark(here))
        if yours in (pushed, mine):
            body = here
        elif untouched_here:
            body = there
        else:
            raise NeVAError(
                "README.md was edited here and on the Hub as well, each differently. Take over here what was written there "
                "(`neva pull` into another folder shows it), or the other way round, then push again."
            )
    if not body and not ours and not theirs:
        return None
    both = {**theirs, **ours}
    for key in _LISTS:
        if key in theirs and key in ours:
            both[key] = union(union([], ours[key]), theirs[key])
    head = yaml.safe_dump(both, sort_keys=False, allow_unicode=True).strip() if both else ""
    return f"---\n{head}\n---\n\n{body}\n" if head else body


def _mark(body: str) -> str | None:
    """The fingerprint that the last push left."""
    found = _MARK.search(body) if has_parts(body) else None
    return found[1] if found else None


def union(ours: Sequence[str], theirs: Any) -> list[str]:
    """Texts of two lists, each once; the second may be one text, or anything."""
    theirs = [theirs] if isinstance(theirs, str) else theirs if isinstance(theirs, list) else []
    return list(dict.fromkeys([*ours, *(one for one in theirs if isinstance(one, str))]))
