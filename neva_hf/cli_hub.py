"""`neva push`, `neva pull`, `neva card`: neuron maps on the Hugging Face Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

FolderArgument = Annotated[Path, typer.Argument(help="The folder of a neuron map.")]
RepoArgument = Annotated[str, typer.Argument(help="A repository on the Hugging Face Hub, such as user/neva-map.")]
RevisionOption = Annotated[
    str | None, typer.Option(help="A branch, or for pull also a tag or a commit. Default: main.")
]
SubfolderOption = Annotated[str | None, typer.Option(help="Where in the repository. Default: its top.")]
TokenOption = Annotated[
    str | None,
    typer.Option(help="A Hub token. Default: HF_TOKEN, or the one of `hf auth login`; others see what you type here."),
]
LicenseOption = Annotated[
    str | None, typer.Option(help="For the card, such as cc-by-4.0. Default: what the card says.")
]
DatasetOption = Annotated[
    list[str] | None, typer.Option("--dataset", help="For the card: the repository of the scenarios. May repeat.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Write one JSON document to standard output.")]


def push(
    folder: FolderArgument,
    repo: RepoArgument,
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Who sees a new repository. Default: what your account says."),
    ] = None,
    revision: RevisionOption = None,
    subfolder: SubfolderOption = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="What is new, for the commit.")] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Ask the owners by a pull request, instead of a commit.")
    ] = False,
    token: TokenOption = None,
    base_model: Annotated[
        str | None,
        typer.Option(help="What the base model is called on the Hub, where the map names a folder of yours."),
    ] = None,
    license: LicenseOption = None,
    dataset: DatasetOption = None,
    card: Annotated[
        bool, typer.Option("--card/--no-card", help="Write the card anew from the map and its report.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Put a map on the Hub with its card, report and pictures, in one commit. What you wrote into the card stays."""
    from .console import command
    from .hub import push_to_hub

    with command(as_json) as console:
        done = push_to_hub(
            folder,
            repo,
            private=private,
            revision=revision,
            subfolder=subfolder,
            commit_message=message,
            create_pr=create_pr,
            token=token,
            base_model=base_model,
            license=license,
            datasets=dataset or (),
            card=card,
        )
        where = done.pr_url or done.commit_url
        console.print(f"Pushed {folder} to {where}", markup=False, soft_wrap=True)
        if not create_pr:
            console.print(f"Try it with: neva chat {repo}", markup=False, soft_wrap=True)
    if as_json:
        typer.echo(json.dumps({"repo": repo, "commit": done.oid, "url": where, "pull_request": done.pr_url}, indent=2))


def pull(
    repo: RepoArgument,
    folder: Annotated[Path, typer.Argument(help="The folder to put it in.")],
    revision: RevisionOption = None,
    subfolder: SubfolderOption = None,
    token: TokenOption = None,
    cache_dir: Annotated[Path | None, typer.Option(help="In place of the Hub's cache folder.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use the cache alone.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a map that is there already.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fetch a map from the Hub, with its card, report and pictures, and check it. Nothing else there is fetched."""
    from .console import command, map_summary, values_table
    from .hub import pull as fetch

    with command(as_json) as console:
        found = fetch(
            repo,
            folder,
            revision=revision,
            subfolder=subfolder,
            token=token,
            cache_dir=cache_dir,
            local_files_only=offline,
            overwrite=overwrite,
        )
        console.print(values_table(found))
        console.print(f"{repo} is in {folder}. Try it with: neva chat {folder}", markup=False, soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(map_summary(found), indent=2))


def card(
    folder: FolderArgument,
    repo: Annotated[
        str | None, typer.Option(help="The repository that it will be in, for the lines that load it.")
    ] = None,
    license: LicenseOption = None,
    dataset: DatasetOption = None,
) -> None:
    """Write the card of a map (README.md) from the map and its report. What you wrote into it stays."""
    from .card import CardOptions, write_card
    from .console import command

    with command() as console:
        written = write_card(folder, CardOptions(repo, None, license, tuple(dataset or ())))
        console.print(f"Wrote {written}", markup=False, soft_wrap=True)


def register(app: typer.Typer) -> None:
    """Adds the three commands."""
    for function in (push, pull, card):
        app.command()(function)
