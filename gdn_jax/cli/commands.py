"""Gated DeltaNet for JAX: text from a model, training of a small one, checks."""

import typer

from gdn_jax.cli.checking import check, info
from gdn_jax.cli.generating import generate
from gdn_jax.cli.training import train

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
for command in (generate, check, info, train):
    app.command()(command)
