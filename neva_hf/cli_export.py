"""`neva export`: a neuron map at fixed strengths, for programs that do not know neva-hf."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from .export import Export

export_app = typer.Typer(
    name="export",
    help="Write a map at fixed strengths for programs that do not know neva-hf.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

MapArgument = Annotated[str, typer.Argument(help="A neuron map: a folder, or a repository on the Hugging Face Hub.")]
StrengthsOption = Annotated[
    str | None,
    typer.Option(
        "--strengths",
        help="What to freeze, such as benevolence=1,power=-0.5. Default: the strengths that the map has of its own.",
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base", help="The base model: a Hub id, a folder or a GGUF file. Default: the one that the map names."
    ),
]
DtypeOption = Annotated[
    str, typer.Option(help="The type to compute in, and to save a merged model in. auto: as the base was saved.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an earlier export.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Write one JSON document to standard output.")]
FolderArgument = Annotated[Path, typer.Argument(help="The folder to make.")]


@export_app.command()
def stock(
    neuron_map: MapArgument,
    output: FolderArgument,
    strengths: StrengthsOption = None,
    base: BaseOption = None,
    dtype: DtypeOption = "auto",
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """A stock PEFT adapter (BEFT, or LoRA for gains): loads with PEFT alone."""
    _export("stock", neuron_map, output, strengths, base, dtype, force, as_json)


@export_app.command()
def merge(
    neuron_map: MapArgument,
    output: FolderArgument,
    strengths: StrengthsOption = None,
    base: BaseOption = None,
    dtype: DtypeOption = "auto",
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """A whole model with the edit in its weights: loads with transformers alone, and in vLLM."""
    _export("merge", neuron_map, output, strengths, base, dtype, force, as_json)


@export_app.command()
def gguf(
    neuron_map: MapArgument,
    output: Annotated[Path, typer.Argument(help="The file to make; its name ends in .gguf.")],
    strengths: StrengthsOption = None,
    base: BaseOption = None,
    dtype: DtypeOption = "auto",
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """A control vector for llama.cpp, for any GGUF of the same base model; gains go into a LoRA adapter beside it."""
    _export("gguf", neuron_map, output, strengths, base, dtype, force, as_json)


def _export(
    kind: str,
    source: str,
    output: Path,
    settings: str | None,
    base: str | None,
    dtype: str,
    force: bool,
    as_json: bool,
) -> None:
    from . import export
    from .console import command
    from .export.output import check_output_file, check_output_folder

    functions: dict[str, Callable[..., Export]] = {
        "stock": export.export_stock,
        "merge": export.export_merged,
        "gguf": export.export_gguf,
    }
    with command(as_json) as console:
        # What is wrong is said before a large model is loaded.
        if kind == "gguf":
            check_output_file(output, ".gguf", force)
        else:
            check_output_folder(output, force)
        model, tokenizer, strengths = _loaded(source, settings, base, dtype)
        made = functions[kind](model, output, strengths, tokenizer=tokenizer, source=source, force=force)
        _tell(console, made, output)
    if as_json:
        typer.echo(json.dumps(made.to_dict(), indent=2))


def _loaded(source: str, settings: str | None, base: str | None, dtype: str) -> tuple[Any, Any, dict[str, float]]:
    """The model with the map on it, its tokenizer, and the strengths to freeze."""
    from .base import load_base
    from .console import parse_settings
    from .errors import NeVAError
    from .model import NeVAModel
    from .neuron_map import NeuronMap
    from .strengths import parse_strengths

    dtypes = ("auto", "float32", "bfloat16", "float16")
    if dtype not in dtypes:
        raise NeVAError(f"There is no type {dtype!r} to compute in: choose one of {', '.join(dtypes)}.")
    neuron_map = NeuronMap.from_pretrained(source)
    if settings is None:
        strengths = dict(neuron_map.config.default_strengths)
        if not any(strengths.values()):
            raise NeVAError(
                "This map has no strengths of its own, so say what to freeze, such as "
                f"--strengths {neuron_map.values[0]}=1 (values: {', '.join(neuron_map.values)})."
            )
    else:
        strengths = parse_settings([part for part in settings.split(",") if part.strip()])
    if not parse_strengths(strengths, neuron_map.values).any():
        raise NeVAError("All strengths are 0, so the export would be the base model. Give some that are not.")
    if base is None and neuron_map.base_model is None:
        raise NeVAError("The neuron map does not name its base model: name it with --base.")
    revision = neuron_map.config.revision if base is None else None
    model, tokenizer = load_base(base or neuron_map.base_model, dtype=dtype, revision=revision)
    return NeVAModel.from_map(model, neuron_map), tokenizer, strengths


def _tell(console: Console, made: Export, output: Path) -> None:
    check = made.check
    console.print(
        f"Checked against the live model on {check.tokens} tokens: the largest difference of a logit is "
        f"{check.difference:.2g} (allowed: {check.tolerance:.2g}; the edit itself moves logits by up to "
        f"{check.effect:.2g}).",
        soft_wrap=True,
    )
    use = {
        "stock": f'load it with PEFT alone: AutoPeftModelForCausalLM.from_pretrained("{output}")',
        "merge": f'load it with transformers alone: AutoModelForCausalLM.from_pretrained("{output}")',
        "gguf": f"llama-cli -m BASE.gguf --control-vector {output}",
    }
    saved, command = str(output), use[made.kind]
    if made.adapter is not None:
        adapter = output.with_name(made.adapter.name)
        saved, command = f"{output} and {adapter}, which belong together", f"{command} --lora {adapter}"
    console.print(f"Saved to {saved}. Next: {command}", markup=False, soft_wrap=True)
