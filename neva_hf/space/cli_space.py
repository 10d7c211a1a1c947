"""`neva space`: the page on this machine."""

from __future__ import annotations

from typing import Annotated

import typer


def space(
    map_source: Annotated[
        str | None,
        typer.Argument(
            metavar="[MAP]", help="A folder, or a repository on the Hub. Default: the one that came along."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="The base model: a Hub id, a folder or a GGUF file. Default: the map's."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where to run: cpu, cuda. Default: CUDA where there is one.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 lets others in.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="The port. Default: the first free one from 7860 on.")
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = True,
) -> None:
    """Open the page: turn values on a circle, and read the answers change.

    Without options it runs the small default model on the CPU; no GPU, no login and no Hub are needed.
    """
    from neva_hf.console import command
    from neva_hf.errors import NeVAError

    with command() as console:
        try:
            from . import page
        except ImportError as error:
            raise NeVAError(
                f"The page needs packages that are not here ({error.name}): pip install 'neva-hf[space]'."
            ) from error
        from .engine import Engine

        console.print("Loading the model ...")
        demo = page.build(Engine.load(map_source, base, device))
        _, address, _ = page.launch(
            demo, server_name=host, server_port=port, inbrowser=open_browser, quiet=True, prevent_thread_lock=True
        )
        console.print(f"The page is at {address} (Ctrl-C ends it)", markup=False, soft_wrap=True)
        demo.block_thread()
