"""`neva evaluate`: what a neuron map does, beside what people use instead, as a report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from .measure import Progress

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def evaluate(
    neuron_map: Annotated[
        str, typer.Argument(help="A neuron map: a folder, or a repository on the Hugging Face Hub.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder for report.json, report.md and the pictures.")
    ] = Path("neva-evaluation"),
    base: Annotated[
        str | None,
        typer.Option(help="The base model: a Hub id, a folder or a GGUF file. Default: the one that the map names."),
    ] = None,
    scenarios: Annotated[
        str,
        typer.Option(help="What to measure on: 'schwartz', a JSON Lines file, or a folder with test.jsonl."),
    ] = "schwartz",
    split: Annotated[str, typer.Option(help="Which split of them. The map must not have been found on it.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first so many scenarios.")] = None,
    values: Annotated[
        str | None, typer.Option(help="Which values to dial, with commas between. Default: all of the map.")
    ] = None,
    strengths: Annotated[str, typer.Option(help="At which strengths, with commas between.")] = "1,-1",
    methods: Annotated[
        str,
        typer.Option(
            help="What else to measure on the same scenarios at the same damage, with commas between: caa, conva, cna, "
            "npti, dpn-le, repe, random-neurons, system-prompt, or all. They are fitted on the train split first."
        ),
    ] = "",
    train_limit: Annotated[
        int | None, typer.Option(min=2, help="Fit these methods on only the first so many training scenarios.")
    ] = None,
    pairs: Annotated[
        str,
        typer.Option(
            help="Values to dial together: how many pairs to draw, or pairs such as power+security,hedonism+power."
        ),
    ] = "5",
    opposing: Annotated[
        bool,
        typer.Option("--opposing/--no-opposing", help="Measure dials under system prompts that push against them."),
    ] = True,
    few: Annotated[
        int, typer.Option(min=1, help="On how many scenarios pairs, opposing prompts and dose curves are measured.")
    ] = 4,
    dose: Annotated[
        bool, typer.Option("--dose", help="Measure dose curves from -2 to 2. Default: report those that the map has.")
    ] = False,
    texts: Annotated[int, typer.Option(min=1, help="Held-out neutral texts that damage is measured on.")] = 16,
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks",
            "--capability",
            help="Benchmarks, with commas between: lambada, arc_easy, piqa, hellaswag, mmlu. Need --data.",
        ),
    ] = "",
    data: Annotated[Path | None, typer.Option(help="The folder with the benchmarks' questions.")] = None,
    questions: Annotated[int, typer.Option(min=2, help="Questions of each benchmark.")] = 100,
    wikitext: Annotated[Path | None, typer.Option(help="A text file to measure perplexity on as well.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="So many windows of 512 tokens of it.")] = 20,
    answers: Annotated[
        int | None,
        typer.Option(
            min=0, help="Generate answers to so many of the questions. Default: 0, or 8 with a judge of answers."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 80,
    judge: Annotated[
        str,
        typer.Option(
            help="Who says whether a value comes first, with commas between: choice (log-probabilities of replies; always "
            "there), text (a classifier reads generated answers), llm (a judge model reads them)."
        ),
    ] = "choice",
    judge_model: Annotated[
        str | None, typer.Option(help="The llm judge, its name at the endpoint. Default: NEVA_JUDGE_MODEL.")
    ] = None,
    judge_url: Annotated[
        str | None,
        typer.Option(
            help="Its endpoint, any that speaks OpenAI's protocol. Default: NEVA_JUDGE_BASE_URL, or the Hub's."
        ),
    ] = None,
    labelled: Annotated[
        Path | None, typer.Option(help="Labelled texts of ValueLens to measure the text judge on.")
    ] = None,
    pictures: Annotated[bool, typer.Option("--pictures/--no-pictures", help="Draw pictures.")] = True,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes that share the work and the cores; each loads the model. Default: one per core, up to four, "
            "for long work of a small model on the CPU.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="For baselines, bootstrap samples and drawn pairs.")] = 0,
    device: Annotated[str | None, typer.Option(help="Where to run, such as cpu or cuda.")] = None,
    dtype: Annotated[
        str, typer.Option(help=f"The type to compute in: {', '.join(_DTYPES)}. auto: as it was saved.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Write the report to standard output too.")] = False,
) -> None:
    """Measure what a map does: control, leakage and damage, alone or beside other methods.

    Writes a report that explains its numbers. Finished pieces are kept in OUTPUT/.state: the same command goes on where it
    was interrupted, and one that asks for more adds to it.
    """
    from .console import command, printable
    from .errors import NeVAError
    from .evaluation import Job, read_report, run_job, write_report
    from .evaluation.extras import ExtraOptions
    from .evaluation.job import system_of
    from .neuron_map import NeuronMap

    with command(as_json) as console, _says_how_to_go_on(console):
        if output.exists() and not output.is_dir():
            raise NeVAError(f"{output} is a file; name a folder for the report.")
        if dtype not in _DTYPES:
            raise NeVAError(f"There is no type {dtype!r} to compute in: choose one of {', '.join(_DTYPES)}.")
        judges = _judges(judge)
        job = Job(
            neuron_map=neuron_map,
            state=output / ".state",
            base=base,
            scenarios=scenarios,
            split=split,
            limit=limit,
            train_limit=train_limit,
            values=_names(values) or None,
            strengths=_numbers(strengths),
            methods=_names(methods),
            pairs=_pairs(pairs),
            opposing=opposing,
            dose=dose,
            few=few,
            texts=texts,
            seed=seed,
            device=device,
            dtype=dtype,
            extras=ExtraOptions(
                tasks=_names(tasks),
                data=None if data is None else str(data),
                questions=questions,
                wikitext=None if wikitext is None else str(wikitext),
                windows=windows,
                answers=answers if answers is not None else 8 if judges else 0,
                max_new_tokens=max_new_tokens,
                judges=judges,
                judge_options={
                    "llm": {"model": judge_model, "base_url": judge_url},
                    "text": {"labelled": None if labelled is None else str(labelled)},
                },
            ),
        )
        with _lines(console) as (tell, progress):
            report = run_job(job, processes, tell, progress)
        found = NeuronMap.from_pretrained(neuron_map)
        system = system_of(found, report["values"])
        write_report(
            report, output, system=system, pictures=pictures, tell=lambda line: console.print(line, markup=False)
        )
        console.print(_table(report))
        console.print(f"Written to {printable(output)}: report.md explains the numbers.", markup=False, soft_wrap=True)
        if as_json:
            typer.echo(json.dumps(read_report(output), indent=1))


@contextmanager
def _says_how_to_go_on(console: Console) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        console.print("\nWhat is finished is kept: give the same command again to go on.", markup=False)
        raise


@contextmanager
def _lines(console: Console) -> Iterator[tuple[Callable[[str], None], Progress[Any]]]:
    """What gets a line per piece, and what shows how far fitting is: one line that changes on a terminal, else lines."""
    from rich.markup import escape

    from .measure import no_progress

    if not console.is_terminal:
        yield lambda line: console.print(line, markup=False, soft_wrap=True), no_progress
        return
    with console.status("loading the model") as status:

        def progress(items: Iterable[Any], what: str) -> Iterator[Any]:
            total = len(items) if isinstance(items, Sized) else "?"
            for number, item in enumerate(items, start=1):
                status.update(f"fitting: {escape(what)} {number} of {total}")
                yield item

        yield lambda line: status.update(escape(line)), progress


def _table(report: dict[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="What each dial does, the mean over values", title_justify="left")
    for heading in ("method", "at"):
        table.add_column(heading)
    for heading in ("target shift", "CSR change", "NLR", "NGLR", "KL", "perplexity"):
        table.add_column(heading, justify="right")

    def shown(interval: list[float | None] | None, form: str) -> str:
        return "n/a" if interval is None or interval[0] is None else f"{interval[0]:{form}}"

    for side in (f"{strength:+g}" for strength in report["strengths"]):
        for name, method in report["methods"].items():
            found = method["strengths"][side]
            table.add_row(
                escape(name),
                side,
                shown(found["target"], "+.3f"),
                shown(found["csr_change"], "+.1%"),
                shown(found["nlr"], ".3f"),
                shown((found["nglr"] or {}).get("all"), ".3f"),
                shown(found["damage"]["kl"], ".3f"),
                shown(found["damage"]["perplexity_ratio"], ".3f"),
            )
    return table


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _judges(text: str) -> list[str]:
    from .errors import NeVAError
    from .evaluation.judges import JUDGES

    found = _names(text)
    if unknown := [name for name in found if name not in JUDGES]:
        raise NeVAError(f"There is no judge {unknown[0]!r:.80}: choose among {', '.join(JUDGES)}.")
    return [name for name in found if JUDGES[name].reads_answers]


def _numbers(text: str) -> list[float]:
    from .errors import NeVAError

    try:
        return [float(part) for part in _names(text)]
    except ValueError:
        raise NeVAError(f"{text!r:.80} are no strengths: write numbers with commas between, such as 1,-1.") from None


def _pairs(text: str) -> int | list[tuple[str, str]]:
    from .errors import NeVAError

    if text.strip().isdecimal():
        return int(text)
    found = []
    for part in _names(text):
        first, plus, second = (side.strip() for side in part.partition("+"))
        if not (first and plus and second):
            raise NeVAError(
                f"{part!r:.80} is no pair of values: write a number of pairs, or pairs such as power+security."
            )
        found.append((first, second))
    return found
