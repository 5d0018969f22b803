"""`gdn-jax train`."""

import dataclasses
import pathlib
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

console = Console()
errors = Console(stderr=True, highlight=False)


def train(
    folder: Annotated[
        pathlib.Path,
        typer.Argument(
            file_okay=False, help="Of the run; one that is there already goes on."
        ),
    ],
    text: Annotated[
        pathlib.Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            show_default="this Python's",
            help="A text saved by gdn_jax.training.text.save.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=2, show_default="4000", help="Of the optimiser."),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, show_default="64", help="Windows of a step."),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(min=1, show_default="1024", help="Bytes of a window."),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(min=0, show_default="0.004", help="The highest on the way."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(show_default="0", help="Of parameters and windows."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of activations.")] = "float32",
    save_every: Annotated[
        int, typer.Option(min=1, help="Steps between saves of the state.")
    ] = 500,
) -> None:
    """Trains the small byte-level model that `gdn-jax generate` uses by default."""
    # Here, since Flax and optax take seconds that `check` and `info` need not wait.
    from gdn_jax.training import kneser_ney, run
    from gdn_jax.training import text as texts
    from gdn_jax.training.recipe import SMALL, Recipe

    asked: dict[str, Any] = dict(
        steps=steps,
        batch=batch,
        length=length,
        learning_rate=learning_rate,
        seed=seed,
    )
    recipe = dataclasses.replace(
        Recipe(), **{name: x for name, x in asked.items() if x is not None}
    )
    try:
        corpus = texts.load(text) if text else texts.corpus()
        columns = "{task.description}", BarColumn(), MofNCompleteColumn()
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task("compiling", total=recipe.steps)

            def show(step: int, point: dict[str, Any]) -> None:
                drafts = "/".join(f"{x:.2f}" for x in point["drafts"])
                losses = f"{point['next']:.3f} bits per byte, drafts {drafts}"
                bar.update(task, completed=step, description=losses)

            curve = run.run(
                SMALL,
                recipe,
                corpus,
                folder,
                on_progress=show,
                save_every=save_every,
                dtype=dtype,
            )
    except (ValueError, OSError) as error:
        errors.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None
    baseline = kneser_ney.bits_per_byte(corpus.train, corpus.held_out)
    console.print(
        f"held out: {curve['held_out_bits_per_byte']:.4f} bits per byte; interpolated "
        f"Kneser-Ney of order 6: {baseline:.4f}. The model is in {folder}."
    )
