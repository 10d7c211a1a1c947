"""What the command line shows: progress with an estimate, tables, and errors in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .errors import NeVAError
from .neuron_map import NeuronMap, natural_order


def make_console(json_output: bool = False) -> Console:
    """The console of a command; with JSON on standard output, words go to standard error."""
    return Console(stderr=json_output, highlight=False)


def show_progress(console: Console) -> Callable[[Iterable[Any], str], Iterable[Any]]:
    """A progress bar with the time that is left, for [`~neva_hf.measure.Progress`].

    Args:
        console (`Console`): Where to show it. Not a terminal: one line when a loop begins and one when it ends.

    Returns:
        `Callable`: Wraps a loop.
    """

    def progress(items: Iterable[Any], what: str) -> Iterator[Any]:
        total = len(items) if isinstance(items, Sized) else None
        if console.quiet or not console.is_terminal:
            console.print(f"{what}: {total if total is not None else 'some'} ...")
            yield from items
            return
        columns = (
            TextColumn("{task.description:>22}"),
            BarColumn(bar_width=36),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            for item in items:
                yield item
                bar.advance(task)

    return progress


@contextmanager
def command(json_output: bool = False) -> Iterator[Console]:
    """What every command runs in: its console, libraries that keep quiet, and errors in one line of standard error.

    Args:
        json_output (`bool`): Whether standard output is kept for JSON.
    """
    quiet_libraries()
    with errors_in_one_line(make_console(True)):
        yield make_console(json_output)


@contextmanager
def errors_in_one_line(console: Console) -> Iterator[None]:
    """Ends the program with one line for what can go wrong; `NEVA_DEBUG=1` shows the traceback.

    Raises:
        `SystemExit`: With 1 for errors and 130 for an interrupt.
    """
    try:
        yield
    except KeyboardInterrupt:
        console.print("\nInterrupted.")
        raise SystemExit(130) from None
    except NeVAError as error:
        if os.environ.get("NEVA_DEBUG"):
            raise
        console.print(f"[bold red]Error:[/] {escape(' '.join(str(error).split()))}", soft_wrap=True)
        raise SystemExit(1) from None
    except (SystemExit, BrokenPipeError):
        raise
    except Exception as error:
        # Typer's own exits and usage errors are exceptions too; its caller shows those.
        if type(error).__module__.split(".")[0] in ("click", "typer") or os.environ.get("NEVA_DEBUG"):
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        console.print(
            f"[bold red]Error:[/] {escape(type(error).__name__)}: {escape(first)} "
            "(NEVA_DEBUG=1 shows where; please report it)",
            soft_wrap=True,
        )
        raise SystemExit(1) from None


def values_table(neuron_map: NeuronMap) -> Table:
    """The values of a map: neurons, layers, fluent range, KL at strength 1."""
    table = Table(title="Values", title_justify="left")
    table.add_column("value")
    for heading in ("neurons", "layers", "fluent from", "to", "KL at -1", "KL at +1"):
        table.add_column(heading, justify="right")
    counts = neuron_map.neuron_counts()
    for value in neuron_map.values:
        low, high = neuron_map.config.ranges.get(value, (None, None))
        kls = [_measured_kl(neuron_map, value, side) for side in ("-1", "+1")]
        table.add_row(
            value,
            str(sum(counts[value].values())),
            str(len(counts[value])),
            "?" if low is None else f"{low:g}",
            "?" if high is None else f"{high:g}",
            *("?" if kl is None else f"{kl:.3f}" for kl in kls),
        )
    return table


def _measured_kl(neuron_map: NeuronMap, value: str, side: str) -> float | None:
    found: Any = neuron_map.config.measurements
    # A stranger's map may hold anything here.
    for key in ("calibration", value, side, "kl"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, (int, float)) else None


def printable(text: object) -> str:
    """A text from a stranger's file without what a terminal would obey.

    Example:

    ```py
    >>> from neva_hf.console import printable
    >>> printable("a\\x1b[2Jb")
    'a?[2Jb'
    ```
    """
    return "".join(sign if sign.isprintable() else "?" for sign in str(text))


def layers_table(neuron_map: NeuronMap, width: int = 30) -> Table:
    """How many neurons each module edits, all values together, with a bar each."""
    table = Table(title="Neurons per layer (all values together)", title_justify="left")
    table.add_column("module")
    table.add_column("neurons", justify="right")
    table.add_column("")
    sizes = {name: edits.index.numel() for name, edits in neuron_map.modules.items()}
    most = max(sizes.values())
    for name in sorted(sizes, key=natural_order):
        table.add_row(escape(printable(name)), str(sizes[name]), "█" * max(1, round(width * sizes[name] / most)))
    return table


def map_summary(neuron_map: NeuronMap) -> dict[str, Any]:
    """What is in a map, for `--json`."""
    config = neuron_map.config
    return {
        "base_model": config.base_model_name_or_path,
        "base": config.base,
        "values": {
            value: {
                "neurons": sum(counts.values()),
                "neurons_per_module": counts,
                "range": config.ranges.get(value),
                "units": config.units.get(value),
            }
            for value, counts in neuron_map.neuron_counts().items()
        },
        "use_gain": config.use_gain,
        "use_gate": config.use_gate,
        "default_strengths": config.default_strengths,
        "provenance": config.provenance,
        "measurements": config.measurements,
    }


def parse_settings(settings: Sequence[str]) -> dict[str, float]:
    """`["benevolence=1.5", "power=-1"]` -> strengths.

    Raises:
        `NeVAError`: If a setting is not of the form NAME=NUMBER.

    Example:

    ```py
    >>> from neva_hf.console import parse_settings
    >>> parse_settings(["benevolence=1.5"])
    {'benevolence': 1.5}
    ```
    """
    found = {}
    for setting in settings:
        name, _, number = setting.partition("=")
        try:
            found[name.strip()] = float(number)
        except ValueError:
            raise NeVAError(
                f"{setting!r} is no setting of a dial: write VALUE=NUMBER, such as benevolence=1.5."
            ) from None
    return found


def parse_layers(text: str) -> list[int]:
    """Layers from their numbers, with commas between; `6-28` is all from 6 to 28.

    Raises:
        `NeVAError`: If a part is neither a number nor two with a hyphen between.

    Example:

    ```py
    >>> from neva_hf.console import parse_layers
    >>> parse_layers("2, 5-7")
    [2, 5, 6, 7]
    ```
    """
    found: set[int] = set()
    for part in text.split(","):
        first, hyphen, last = (side.strip() for side in part.partition("-"))
        ends = [first, last] if hyphen else [first]
        if not all(end.isdecimal() for end in ends) or int(ends[0]) > int(ends[-1]):
            raise NeVAError(f"{part.strip()!r:.80} names no layers: write numbers, such as 6-28 or 3,7,11.")
        found.update(range(int(ends[0]), int(ends[-1]) + 1))
    return sorted(found)


def quiet_libraries() -> None:
    """Keeps loading bars and notices of the libraries below out of the command line's output."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("torchao").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    if not sys.warnoptions:
        # Warnings of our own (a strength outside its range) in one line, without the place in the source.
        warnings.formatwarning = lambda message, category, *_, **__: f"Warning: {message}\n"
