"""Gated DeltaNet for JAX: text from a model, training of a small one, checks."""

from typing import Annotated

import typer

import gdn_jax
from gdn_jax.cli.checking import check, info
from gdn_jax.cli.generating import generate
from gdn_jax.cli.training import train

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
for command in (generate, check, info, train):
    app.command()(command)


def _version(asked: bool) -> bool:
    if asked:
        typer.echo(f"gdn-jax {gdn_jax.__version__}")
        raise typer.Exit
    return asked


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Says which, and exits."
        ),
    ] = False,
) -> None:
    del version  # its callback has answered
