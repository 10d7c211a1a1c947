"""The `neva` command.

Everything that is shown goes through a rich console; with `--json`, standard output holds one JSON document and words
go to standard error. Exit codes: 0 done, 1 something given cannot be used, 2 a wrong option, 130 interrupted.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    from .scenarios import Scenario

# What `--score` takes: the names of identify.score.SCORES, which would bring torch with them.
SCORE_NAMES = ("attribution", "gradient", "probe", "contrast", "probability")
DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")

try:
    import typer
except ImportError:  # pragma: no cover - said by `main`
    typer = None  # type: ignore[assignment]

if typer is not None:
    app = typer.Typer(
        name="neva",
        help="Dial the values of a language model: find the neurons that carry a value, edit them while it runs.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )

    MapArgument = Annotated[
        str, typer.Argument(help="A neuron map: a folder, or a repository on the Hugging Face Hub.")
    ]
    BaseOption = Annotated[
        str | None,
        typer.Option(
            "--base", help="The base model: a Hub id, a folder or a GGUF file. Default: the one that the map names."
        ),
    ]
    JsonOption = Annotated[bool, typer.Option("--json", help="Write one JSON document to standard output.")]
    SeedOption = Annotated[int, typer.Option(help="Seed for sampling.")]

    def _version(wanted: bool) -> None:
        if wanted:
            from ._version import __version__

            typer.echo(f"neva-hf {__version__}")
            raise typer.Exit

    @app.callback()
    def _root(
        version: Annotated[
            bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
        ] = False,
    ) -> None:
        pass

    @app.command()
    def demo(
        map_source: Annotated[
            str | None,
            typer.Option("--map", help="Skip the search and use this map: a folder, or a repository on the Hub."),
        ] = None,
        values: Annotated[
            str, typer.Option(help="Two of Schwartz's ten values, with a comma between.")
        ] = "benevolence,stimulation",
        output: Annotated[Path, typer.Option(help="Where the map that is found is saved.")] = Path("neva-demo-map"),
        as_json: JsonOption = False,
    ) -> None:
        """Find two values in a small real model, save them as a map, and hear the answers change.

        Takes some minutes on two cores, needs no GPU and no login.
        """
        from .console import command
        from .demo import run_demo

        with command(as_json) as console:
            shown = run_demo(console, map_source=map_source, values=_names(values), output=output)
        if as_json:
            typer.echo(json.dumps(shown, indent=2))

    @app.command()
    def identify(
        output: Annotated[Path, typer.Argument(help="The folder to save the neuron map in.")],
        base: Annotated[
            str | None,
            typer.Option(
                help="The model to search: a Hub id, a folder or a GGUF file. Default: SmolLM2-135M-Instruct."
            ),
        ] = None,
        scenarios: Annotated[
            str, typer.Option(help="What to search with: 'schwartz', a JSON Lines file, or a folder with train.jsonl.")
        ] = "schwartz",
        values: Annotated[
            str | None, typer.Option(help="Which values, with commas between. Default: all that the scenarios hold.")
        ] = None,
        value_system: Annotated[
            str | None,
            typer.Option(
                help="Definitions to go with the map: a shipped system such as schwartz10, or a JSON/YAML file."
            ),
        ] = None,
        neurons: Annotated[int, typer.Option(min=1, help="How many neurons per value.")] = 500,
        layers: Annotated[
            str | None,
            typer.Option(help="Which layers: 6-28, or 3,7,11. Default: from 20% to 95% of the depth."),
        ] = None,
        leakage_penalty: Annotated[
            float | None,
            typer.Option(
                min=0.0,
                help="What it costs to shift the other values: neurons and shifts are chosen together. 0: the highest "
                "scores of --score, shifted as scored. Default: 1, or 0 with --score.",
            ),
        ] = None,
        score: Annotated[
            str | None,
            typer.Option(
                help=f"With a --leakage-penalty of 0, how neurons are scored: {', '.join(SCORE_NAMES)} (the first "
                "unless named). Above 0, neurons are not chosen by a score, and none may be named."
            ),
        ] = None,
        gains: Annotated[
            bool | None,
            typer.Option(
                "--gains/--no-gains",
                help="Edit neurons in proportion to their activation as well, so that dials do more at the same cost, or "
                "by one constant per layer, which takes no time in decoding. Default: gains, from 100 scenarios on.",
            ),
        ] = None,
        gates: Annotated[
            bool,
            typer.Option(
                "--gates", help="Train gates too: edits then act only as far as each token needs (another pass)."
            ),
        ] = False,
        dose: Annotated[
            int,
            typer.Option(
                min=0,
                help="Measure what each dial does at several strengths on so many scenarios of dev.jsonl, the "
                "scenarios' dev split, and save it with the map. 0: do not.",
            ),
        ] = 4,
        limit: Annotated[int | None, typer.Option(min=1, help="Use only the first so many scenarios.")] = None,
        samples: Annotated[
            int,
            typer.Option(
                min=1, help="How many samples tell what shifts cost: more take longer and find better shifts."
            ),
        ] = 2048,
        target_kl: Annotated[
            float, typer.Option(help="KL divergence from the base model at strength 1, in nats per token.")
        ] = 0.05,
        device: Annotated[
            str | None,
            typer.Option(help="Where to run, such as cpu or cuda. Default: the CPU, or each process's own GPU."),
        ] = None,
        dtype: Annotated[
            str, typer.Option(help=f"The type to compute in: {', '.join(DTYPE_NAMES)}. auto: as it was saved.")
        ] = DTYPE_NAMES[0],
        checkpoint: Annotated[
            Path | None,
            typer.Option(
                help="A folder that keeps what is done, so that the same command goes on after it was killed. Default: "
                "OUTPUT/.identify, removed when the map is saved. One that you name is kept."
            ),
        ] = None,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a map that is there already.")] = False,
        as_json: JsonOption = False,
    ) -> None:
        """Find the neurons of values in a model, and save them as a neuron map.

        Several processes share the work:
        [bold]torchrun --nproc-per-node 2 -m neva_hf.cli identify ...[/] on CPUs,
        [bold]accelerate launch -m neva_hf.cli identify ...[/] on GPUs.
        """
        from .base import load_base
        from .console import command, map_summary, parse_layers, show_progress, values_table
        from .errors import NeVAError
        from .identify import identify_neurons
        from .identify.calibrate import check_target_kl
        from .identify.parallel import processes
        from .scenarios import load_scenarios, scenario_values
        from .values import load_value_system

        with command(as_json) as console:
            number, count = processes()
            # All processes do the same, and one of them talks; an error may be one process's own, so each says its own.
            console.quiet = number > 0
            # What is wrong is said before the long work, not after it.
            if output.exists() and not output.is_dir():
                raise NeVAError(f"{output} is a file; name a folder for the neuron map.")
            if (output / "adapter_config.json").exists() and not overwrite:
                raise NeVAError(f"There is an adapter in {output} already; use --overwrite to replace it.")
            if checkpoint is not None and checkpoint.exists() and not checkpoint.is_dir():
                raise NeVAError(f"{checkpoint} is a file; name a folder for the checkpoints.")
            if score is not None and score not in SCORE_NAMES:
                raise NeVAError(f"There is no score {score!r}: choose one of {', '.join(SCORE_NAMES)}.")
            if score is not None and leakage_penalty:
                raise NeVAError(
                    f"--score {score} has no say with --leakage-penalty {leakage_penalty:g}: above 0, neurons are chosen "
                    "by what they do to all values together. Drop one of the two."
                )
            if dtype not in DTYPE_NAMES:
                raise NeVAError(f"There is no type {dtype!r} to compute in: choose one of {', '.join(DTYPE_NAMES)}.")
            check_target_kl(target_kl)
            wanted_layers = parse_layers(layers) if layers is not None else None
            found = load_scenarios(scenarios, "train", limit=limit)
            wanted = _names(values) if values else scenario_values(found)
            dosed, why = _dose_scenarios(scenarios, wanted, dose)
            if why:
                console.print(why, markup=False, soft_wrap=True)
            system = value_system or ("schwartz10" if scenarios == "schwartz" else None)
            definitions = load_value_system(system) if system else None
            if device is None and count > 1:
                device = _own_device()
            model, tokenizer = load_base(base, device=device, dtype=dtype)
            neuron_map = identify_neurons(
                model,
                tokenizer,
                found,
                values=wanted,
                neurons=neurons,
                score=score or SCORE_NAMES[0],
                leakage_penalty=(1.0 if score is None else 0.0) if leakage_penalty is None else leakage_penalty,
                gains=gains,
                layers=wanted_layers,
                target_kl=target_kl,
                value_system=definitions,
                dose_scenarios=dosed,
                gates=gates,
                samples=samples,
                checkpoint=(checkpoint or output / ".identify") / "pass",
                progress=show_progress(console),
            )
            if number > 0:
                return
            neuron_map.save_pretrained(output)
            if checkpoint is None:
                shutil.rmtree(output / ".identify", ignore_errors=True)
            console.print(values_table(neuron_map))
            console.print(f"Saved to {output}. Try it with: neva chat {output}", markup=False, soft_wrap=True)
        if as_json:
            typer.echo(json.dumps(map_summary(neuron_map), indent=2))

    @app.command()
    def chat(
        neuron_map: MapArgument,
        base: BaseOption = None,
        settings: Annotated[
            list[str] | None,
            typer.Option("--set", help="A dial to begin with, such as --set benevolence=1.5. May repeat."),
        ] = None,
        max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 200,
        temperature: Annotated[
            float, typer.Option(min=0.0, help="0 for the likeliest words, above 0 to sample.")
        ] = 0.0,
        seed: SeedOption = 0,
    ) -> None:
        """Chat with a model, and turn its dials while you do: /set benevolence 1.5, /values, /compare."""
        from .chat import chat as talk
        from .console import command, parse_settings
        from .talk import AnswerOptions

        with command() as console:
            strengths = parse_settings(settings or [])
            model, tokenizer = _load(neuron_map, base, strengths)
            talk(
                console,
                model,
                tokenizer,
                lambda: console.input("[bold cyan]you>[/] ") if sys.stdin.isatty() else _piped_line(),
                strengths=strengths,
                options=AnswerOptions(max_new_tokens, temperature, seed),
            )

    @app.command()
    def inspect(neuron_map: MapArgument, as_json: JsonOption = False) -> None:
        """Show what is in a neuron map: values, neurons per layer, ranges, where it came from. Loads no model."""
        from .console import command, layers_table, map_summary, printable, values_table
        from .neuron_map import NeuronMap

        with command(as_json) as console:
            found = NeuronMap.from_pretrained(neuron_map)
            if as_json:
                typer.echo(json.dumps(map_summary(found), indent=2))
                return
            title = f"Neuron map of {printable(found.base_model or 'an unnamed base model')}"
            console.print(title, markup=False, style="bold", soft_wrap=True)
            console.print(values_table(found))
            if found.config.use_gain:
                console.print(
                    "With gains: an edit adds a shift and a multiple of the neuron's own activation.", soft_wrap=True
                )
            console.print(layers_table(found))
            base = {key: item for key, item in (found.config.base or {}).items() if key != "fingerprint"}
            for title, content in (("Made by", found.config.provenance), ("Base model", base)):
                console.print(f"[bold]{title}[/]")
                for key, item in content.items():
                    console.print(f"  {printable(key)}: {printable(item)}", markup=False, soft_wrap=True)

    from .cli_evaluate import evaluate

    app.command()(evaluate)

    def _piped_line() -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line

    def _load(source: str, base: str | None, strengths: dict[str, float]) -> tuple[Any, Any]:
        from .base import load_base
        from .model import NeVAModel
        from .neuron_map import NeuronMap
        from .strengths import parse_strengths

        # What is wrong with the map or the dials is said before a large model is loaded.
        neuron_map = NeuronMap.from_pretrained(source)
        parse_strengths(strengths, neuron_map.values)
        if base is None:
            model = NeVAModel.from_pretrained(source)
            return model, model.tokenizer
        loaded, tokenizer = load_base(base)
        return NeVAModel.from_map(loaded, neuron_map), tokenizer

    def _dose_scenarios(source: str, values: Sequence[str], number: int) -> tuple[list[Scenario], str]:
        """Scenarios spread over the dev split of a set, or none and a sentence that says why."""
        from . import scenarios as shipped
        from .measure import contrast

        if number == 0:
            return [], ""
        home = Path(shipped.__file__).parent / source if source in shipped.SCENARIO_SETS else Path(source)
        file = home.with_name("dev.jsonl") if home.name == "train.jsonl" else home / "dev.jsonl"
        if not file.is_file():
            return [], "No dose curves: these scenarios have no dev split (dev.jsonl beside train.jsonl)."
        dev = shipped.load_scenarios(file)
        number = min(number, len(dev))
        spread = [dev[place * len(dev) // number] for place in range(number)]
        unheard = [value for value in values if not any(contrast(list(one.replies), value) for one in spread)]
        if unheard:
            return [], f"No dose curves: the dev split, or this part of it, does not contrast {', '.join(unheard)}."
        return spread, ""

    def _own_device() -> str:
        from accelerate import PartialState

        return str(PartialState().device)

    def _names(text: str) -> list[str]:
        return [name.strip() for name in text.split(",") if name.strip()]

    from .cli_export import export_app

    app.add_typer(export_app, name="export")

    from . import cli_hub

    cli_hub.register(app)

    from . import cli_maps

    app.command()(cli_maps.diff)
    app.command()(cli_maps.merge_maps)

    from .space.cli_space import space

    app.command()(space)


def main() -> None:
    """The entry point of `neva`."""
    if typer is None:
        sys.stderr.write("Error: the command line needs two more packages: pip install 'neva-hf[cli]'\n")
        raise SystemExit(1)
    app()


if __name__ == "__main__":
    main()
