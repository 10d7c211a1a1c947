"""`neva diff` and `neva merge-maps`: neuron maps beside each other, and several in one. No model is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from .compare_maps import Agreement, MapComparison

JsonOption = Annotated[bool, typer.Option("--json", help="Write one JSON document to standard output.")]
_HEADINGS = ("only A", "both", "only B", "overlap", "rank corr.", "cosine")
_GAIN_HEADINGS = ("gains: rank corr.", "cosine")


def diff(
    a: Annotated[str, typer.Argument(help="A neuron map: a folder, or a repository on the Hugging Face Hub.")],
    b: Annotated[str, typer.Argument(help="Another of the same base model, or of a fine-tune of it.")],
    pairs: Annotated[
        list[str] | None,
        typer.Option(
            "--pair", help="Compare a value of A with one of another name of B: power=dominance. May repeat."
        ),
    ] = None,
    value: Annotated[
        str | None, typer.Option(help="Show the layers of this value of A alone; of all together by default.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what two neuron maps have in common: which neurons, per value and layer, and how they are edited.

    overlap: neurons in both over neurons in either. rank corr.: Spearman's, of the shifts of neurons in both. cosine: of
    all shifts. Where both maps have gains, the same of their gains.
    """
    from .compare_maps import compare_maps
    from .console import command
    from .errors import NeVAError
    from .neuron_map import NeuronMap
    from .strengths import unknown_value_message

    with command(as_json) as console:
        first, second = NeuronMap.from_pretrained(a), NeuronMap.from_pretrained(b)
        wanted = _pairs(pairs or [], first.values, second.values)
        found = compare_maps(first, second, wanted)
        compared = [one.value_a for one in found.values]
        if value is not None and value not in first.values:
            raise NeVAError(unknown_value_message(value, first.values))
        if value is not None and value not in compared:
            raise NeVAError(f"{value!r} is only in the first map; compare it with a value of the other by --pair.")
        if not as_json:
            _show(console, found, a, b, value)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))


def merge_maps(
    output: Annotated[Path, typer.Argument(help="The folder to save the merged map in.")],
    sources: Annotated[
        list[str],
        typer.Argument(help="Two neuron maps or more of one base model: folders, or repositories on the Hub."),
    ],
    renames: Annotated[
        list[str] | None,
        typer.Option(
            "--rename",
            help="Give a value of one map another name: MAP:power=power_a, with MAP as written before, or A, B, ... in the "
            "order of the maps. May repeat.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a map that is in the folder.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Put the values of several neuron maps of one base model into one map.

    Values keep their units, ranges and measurements, and do the same as before.
    """
    from .console import command, map_summary, values_table
    from .errors import NeVAError
    from .merge_maps import merge_maps as merged_of
    from .neuron_map import NeuronMap

    with command(as_json) as console:
        if output.exists() and not output.is_dir():
            raise NeVAError(f"{output} is a file; name a folder for the neuron map.")
        if (output / "adapter_config.json").exists() and not overwrite:
            raise NeVAError(f"There is an adapter in {output} already; use --overwrite to replace it.")
        new_names = parse_renames(renames or [], sources)
        maps = [NeuronMap.from_pretrained(source) for source in sources]
        merged = merged_of(maps, renamed=new_names, sources=sources)
        merged.save_pretrained(output)
        console.print(values_table(merged))
        console.print(f"Saved to {output}.", markup=False, soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(map_summary(merged), indent=2))


def parse_renames(renames: Iterable[str], sources: Sequence[str]) -> list[dict[str, str]]:
    """`["B:power=power_b"]` -> for each map, its values' new names.

    Args:
        renames (`Iterable[str]`): `MAP:VALUE=NAME`; MAP is one of `sources`, or its letter where no map is called so.
        sources (`Sequence[str]`): The maps.

    Returns:
        `list[dict[str, str]]`: As [`~neva_hf.merge_maps.merge_maps`] takes them.

    Raises:
        `NeVAError`: If one is not of that form, or names no map, or one that was given twice.

    Example:

    ```py
    >>> from neva_hf.cli_maps import parse_renames
    >>> parse_renames(["B:power=power_b"], ["maps/first", "maps/second"])
    [{}, {'power': 'power_b'}]
    ```
    """
    from .errors import NeVAError

    found: list[dict[str, str]] = [{} for _ in sources]
    for rename in renames:
        start, equals, new = rename.rpartition("=")
        source, colon, value = start.rpartition(":")
        if not (equals and colon and source and value and new):
            raise NeVAError(f"{rename!r:.200} renames nothing: write MAP:VALUE=NAME, such as A:power=power_a.")
        places = [number for number, one in enumerate(sources) if one == source]
        if not places and len(source) == 1 and 0 <= ord(source.upper()) - ord("A") < len(sources):
            places = [ord(source.upper()) - ord("A")]
        if len(places) != 1:
            letters = ", ".join(f"{chr(ord('A') + number)} for {one}" for number, one in enumerate(sources[:26]))
            raise NeVAError(f"{source!r:.120} in {rename!r:.200} names {len(places)} of the maps. Write {letters}.")
        if value in found[places[0]]:
            raise NeVAError(f"{value!r:.80} of {source:.120} is renamed twice. Drop one of the two.")
        found[places[0]][value] = new
    return found


def _pairs(texts: Sequence[str], ours: Sequence[str], theirs: Sequence[str]) -> dict[str, str] | None:
    """Which values to compare: those of the same name, and those that were paired by hand instead."""
    from .errors import NeVAError
    from .strengths import unknown_value_message

    if not texts:
        return None
    chosen: dict[str, str] = {}
    for text in texts:
        one, equals, two = (part.strip() for part in text.partition("="))
        if not equals:
            raise NeVAError(f"{text!r:.200} is no pair of values: write VALUE_OF_A=VALUE_OF_B.")
        for name, names in ((one, ours), (two, theirs)):
            if name not in names:
                raise NeVAError(unknown_value_message(name, names))
        chosen[one] = two
    same = {name: name for name in ours if name in theirs and name not in chosen and name not in chosen.values()}
    return {name: (chosen | same)[name] for name in ours if name in chosen or name in same}


def _show(console: Console, found: MapComparison, a: str, b: str, value: str | None) -> None:
    for letter, source, only in (("A", a, found.only_a), ("B", b, found.only_b)):
        alone = f" (not compared: {', '.join(only)})" if only else ""
        console.print(f"{letter}: {source}{alone}", markup=False, soft_wrap=True)
    if found.weights not in ("same", "unknown"):
        console.print(f"The weights that the two were made on are {found.weights}.", soft_wrap=True)
    names = [one.value_a if one.value_a == one.value_b else f"{one.value_a} / {one.value_b}" for one in found.values]
    console.print(_table("Values", "value", zip(names, (one.together for one in found.values), strict=True)))
    if value is None:
        modules, what = found.modules, "all values together"
    else:
        modules = next(one.modules for one in found.values if one.value_a == value)
        what = value
    console.print(_table(f"Layers ({what})", "module", modules.items()))


def _table(title: str, what: str, rows: Iterable[tuple[str, Agreement]]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    from .console import printable

    table = Table(title=title, title_justify="left")
    table.add_column(what, overflow="fold")
    rows = list(rows)
    gains = any(one.gain_cosine is not None for _, one in rows)
    for heading in _HEADINGS + (_GAIN_HEADINGS if gains else ()):
        table.add_column(heading, justify="right")
    for name, one in rows:
        numbers = (one.spearman, one.cosine, *((one.gain_spearman, one.gain_cosine) if gains else ()))
        table.add_row(
            escape(printable(name)),
            str(one.neurons_a - one.shared),
            str(one.shared),
            str(one.neurons_b - one.shared),
            f"{one.overlap:.2f}",
            *("-" if number is None else f"{number:+.2f}" for number in numbers),
        )
    return table
