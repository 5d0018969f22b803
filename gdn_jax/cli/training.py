"""`gdn-jax train`."""

import pathlib
import tempfile
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from gdn_jax.cli.notes import errors, errors_of
from gdn_jax.cli.options import Dtype

console = Console()


def train(
    folder: Annotated[
        pathlib.Path,
        typer.Argument(help="Of the run; one that is there already goes on."),
    ],
    text: Annotated[
        pathlib.Path | None,
        typer.Option(
            help="A text saved by gdn_jax.training.text.save. Default: this Python's."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Of the optimiser.")] = 4000,
    batch: Annotated[int, typer.Option(min=1, help="Windows of a step.")] = 64,
    length: Annotated[int, typer.Option(min=1, help="Bytes of a window.")] = 1024,
    learning_rate: Annotated[
        float, typer.Option(min=0, help="The highest, after the warmup.")
    ] = 4e-3,
    seed: Annotated[int, typer.Option(help="Of parameters and windows.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="Of activations.")] = Dtype.float32,
    save_every: Annotated[
        int, typer.Option(min=1, help="Steps between saves of the state.")
    ] = 500,
) -> None:
    """Trains the small byte-level model that `gdn-jax generate` uses by default."""
    with errors():
        # Here, since Flax and optax take seconds that `check` and `info` need not wait.
        from gdn_jax.training import kneser_ney, run
        from gdn_jax.training import text as texts
        from gdn_jax.training.recipe import SMALL, Recipe

        recipe = Recipe(
            steps=steps,
            batch=batch,
            length=length,
            learning_rate=learning_rate,
            seed=seed,
        )
        if text is None:
            corpus = texts.corpus()
        else:
            wanted = "a text that gdn_jax.training.text.save wrote"
            with errors_of("--text", text, wanted):
                corpus = texts.load(text)
        with errors_of("FOLDER", folder, "a folder that can be written to"):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
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
                dtype=dtype.value,
            )
    baseline = kneser_ney.bits_per_byte(corpus.train, corpus.held_out)
    console.print(
        f"held out: {curve['held_out_bits_per_byte']:.4f} bits per byte; interpolated "
        f"Kneser-Ney of order 6: {baseline:.4f}. The model is in {folder}."
    )
