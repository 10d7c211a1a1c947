"""The model card of a neuron map: written from the map and its report, and written anew without losing what others wrote.

A card has generated parts between markers (card_text.py); all else, and what was added to the metadata, is its owner's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from . import card_parts, card_report
from .card_merge import merge, split, union
from .card_text import fill, fingerprint, free_text, is_repo_id
from .errors import NeVAError
from .evaluation.report import read_report
from .neuron_map import NeuronMap

__all__ = ["CardOptions", "Report", "make_card", "merge", "split", "template", "write_card"]

CARD = "README.md"
REPORT = "report.json"
REPORT_FOLDERS = ("", "report/")
MAX_CARD_BYTES = 2 * 2**20

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
_TAGS = ("neva-hf", "peft", "neuron-map", "activation-steering", "human-values", "interpretability")


@dataclass(frozen=True)
class CardOptions:
    """What a card says that neither the map nor its report knows.

    Args:
        repo_id (`str`, *optional*): The repository that the map is in, for the lines that load it.
        subfolder (`str`, *optional*): Where in the repository.
        license (`str`, *optional*): A license of the Hub's list, such as `"apache-2.0"`. `None` keeps the card's.
        datasets (`Sequence[str]`): Repositories of the scenarios. Empty keeps the card's.

    Raises:
        `NeVAError`: If one cannot be used.
    """

    repo_id: str | None = None
    subfolder: str | None = None
    license: str | None = None
    datasets: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.license is not None and not _LICENSE.fullmatch(self.license):
            raise NeVAError(
                f"{self.license!r:.80} is no license of the Hub's list: write it as 'apache-2.0', 'cc-by-4.0', ..."
            )
        for name in (*self.datasets, *([self.repo_id] if self.repo_id is not None else [])):
            if not is_repo_id(name):
                raise NeVAError(f"{name!r:.120} cannot be the id of a repository on the Hub. Write it as user/name.")


@dataclass(frozen=True)
class Report:
    """A report and what lies beside it.

    Args:
        numbers (`Mapping[str, Any]`): The report.
        prefix (`str`): Its folder as seen from the card: `""` or `"report/"`.
        pictures (`Collection[str]`): Names of the pictures that are there.
    """

    numbers: Mapping[str, Any]
    prefix: str = ""
    pictures: Collection[str] = ()


def write_card(folder: str | os.PathLike[str], options: CardOptions | None = None) -> Path:
    """Writes the card of a map beside it, or writes it anew.

    Args:
        folder (`str` or `os.PathLike`): The map's; `report.json` is looked for in it and in its folder `report`.
        options ([`CardOptions`], *optional*): What the card says besides.

    Returns:
        `pathlib.Path`: The `README.md`.

    Raises:
        `NeVAError`: If there is no sound map, or its report or card cannot be used.

    Example:

    ```py
    >>> from neva_hf.card import write_card
    >>> write_card("my-map")  # doctest: +SKIP
    ```
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NeVAError(f"There is no folder {folder}: name the folder of a neuron map.")
    text = make_card(
        NeuronMap.from_pretrained(folder),
        local_report(folder),
        local_card(folder),
        options,
        name=folder.resolve().name,
    )
    unfinished = folder / f".{CARD}.{os.getpid()}"
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, folder / CARD)
    return folder / CARD


def make_card(
    neuron_map: NeuronMap,
    report: Report | None = None,
    existing: str | None = None,
    options: CardOptions | None = None,
    name: str | None = None,
) -> str:
    """The card of a map.

    Args:
        neuron_map ([`NeuronMap`]): The map.
        report ([`Report`], *optional*): What was measured.
        existing (`str`, *optional*): The card that there is: what its owner wrote in it stays.
        options ([`CardOptions`], *optional*): What the card says besides.
        name (`str`, *optional*): Of the map, for the metadata; the repository's when `None`.

    Returns:
        `str`: The whole `README.md`.

    Raises:
        `NeVAError`: If the report or the existing card cannot be used.
    """
    options = options or CardOptions()
    metadata, body = split(existing)
    license = options.license or metadata.get("license")
    license = license if isinstance(license, str) and _LICENSE.fullmatch(license) else None
    if report is not None:
        card_report.check_report(report.numbers, neuron_map)
        headline, told = card_report.from_report(report.numbers, report.pictures, report.prefix)
        told += f"\n\nAll numbers are in [`{REPORT}`]({report.prefix}{REPORT})."
    else:
        headline, told = "", card_report.from_map(neuron_map)
    body = fill(
        body or template(),
        {
            "title": card_parts.title(neuron_map, headline),
            "use": card_parts.use(neuron_map, options.repo_id, options.subfolder),
            "values": card_parts.values(neuron_map),
            "results": told,
            "neurons": card_parts.neurons(neuron_map),
            "provenance": card_parts.provenance(neuron_map, license),
        },
    )
    body = fill(body, {"mark": f"<!-- neva:free-text {fingerprint(free_text(body))} -->"})
    data = _metadata(
        neuron_map, report, metadata, options, license, (options.repo_id or name or "neuron-map").split("/")[-1]
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body.strip()}\n"


def _metadata(
    neuron_map: NeuronMap,
    report: Report | None,
    kept: Mapping[str, Any],
    options: CardOptions,
    license: str | None,
    name: str,
) -> ModelCardData:
    own = {key: item for key, item in kept.items() if key != "model-index"}
    system = card_parts.value_system(neuron_map)
    tags = [*_TAGS, *(["schwartz"] if system is not None and "schwartz" in system.name.lower() else [])]
    own |= {"library_name": "neva-hf", "pipeline_tag": own.get("pipeline_tag", "text-generation")}
    if is_repo_id(neuron_map.base_model):
        own |= {"base_model": neuron_map.base_model, "base_model_relation": "adapter"}
    if license is not None:
        own["license"] = license
    own["tags"] = union(tags, own.get("tags"))
    if datasets := union(options.datasets, own.get("datasets")):
        own["datasets"] = datasets
    results = _others_results(kept)
    if report is not None:
        dataset = datasets[0] if datasets else None
        results += card_report.results(report.numbers, dataset if is_repo_id(dataset) else None)
    if results:
        own |= {"model_name": own.get("model_name") or name, "eval_results": results}
    first = ("license", "library_name", "pipeline_tag", "base_model", "base_model_relation", "tags", "datasets")
    order = [*(key for key in first if key in own), *(key for key in own if key not in first)]
    return ModelCardData(**{key: own[key] for key in order})


def _others_results(kept: Mapping[str, Any]) -> list[Any]:
    """What the owner wrote into `model-index` on other data sets."""
    if not kept.get("model-index"):
        return []
    try:
        found = ModelCardData(**{"model-index": kept["model-index"]}).eval_results or []
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise NeVAError(
            f"The card's `model-index` cannot be read ({error}): mend it in README.md, or remove it."
        ) from error
    return [result for result in found if result.dataset_type != card_report.DATASET]


def template() -> str:
    """The card of a map before its parts are filled in, as it comes with neva-hf."""
    return resources.files("neva_hf").joinpath("card_template.md").read_text(encoding="utf-8")


def local_card(folder: Path) -> str | None:
    """The card in a folder, if there is one."""
    return card_of(folder / CARD) if (folder / CARD).is_file() else None


def card_of(path: Path) -> str:
    """The text of a card.

    Raises:
        `NeVAError`: If it is too large, or no text.
    """
    if path.stat().st_size > MAX_CARD_BYTES:
        raise NeVAError(f"{path} is larger than {MAX_CARD_BYTES >> 20} MiB; that is no card.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise NeVAError(f"{path} is no text in UTF-8; save it as such.") from error


def local_report(folder: Path) -> Report | None:
    """The report in a map's folder, and the pictures that are beside it."""
    for prefix in REPORT_FOLDERS:
        place = folder / prefix
        if (place / REPORT).is_file():
            return Report(report_of(place / REPORT), prefix, {path.name for path in place.glob("*.png")})
    return None


def report_of(path: Path) -> dict[str, Any]:
    """A report that may be a stranger's.

    Raises:
        `NeVAError`: If it cannot be read.
    """
    try:
        return read_report(path)
    except RecursionError as error:
        raise NeVAError(f"{path} is nested too deeply for a report: evaluate again, or remove it.") from error
