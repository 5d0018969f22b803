"""`gdn-jax generate`."""

import os
import pathlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from gdn_jax.cli import ctrl_c
from gdn_jax.cli.rates import Rates

if TYPE_CHECKING:
    from gdn_jax.generation.engine import Engine
    from gdn_jax.generation.requests import Request
    from gdn_jax.models.tokenizer import Tokenizer

PROMPT = "def read_"  # of the shipped model, which writes Python's documentation
BROKEN_PIPE = 141  # what shells have for a reader that has left
notes = Console(stderr=True, highlight=False)  # stdout has the texts alone


def _folder(path: pathlib.Path | None) -> pathlib.Path | None:
    if path is not None and not path.is_dir():
        raise typer.BadParameter(
            f"there is no folder {path}. It takes one with a config.json and "
            f"safetensors, as `hf download Qwen/Qwen3.5-4B --local-dir DIR` makes it."
        )
    return path


def _prompts_file(path: pathlib.Path | None) -> pathlib.Path | None:
    if path is not None and str(path) != "-" and not path.is_file():
        raise typer.BadParameter(
            f"there is no file {path}. It takes one with a prompt a line, or - for "
            f"stdin."
        )
    return path


def _share(value: float) -> float:
    if not 0 < value <= 1:
        raise typer.BadParameter(f"{value} is not in (0, 1]; 1 is off.")
    return value


def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(
            show_default=f"{PROMPT!r}, of the shipped model",
            help="What the text goes on from.",
        ),
    ] = None,
    model: Annotated[
        pathlib.Path | None,
        typer.Option(
            callback=_folder,
            show_default="the shipped small model",
            help="A Hugging Face folder.",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of each text.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, help="0: always the likeliest token.")
    ] = 0.7,
    top_p: Annotated[
        float,
        typer.Option(
            callback=_share, help="Only of the likeliest tokens of this share."
        ),
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed, the same texts.")] = 0,
    batch: Annotated[
        pathlib.Path | None,
        typer.Option(
            callback=_prompts_file,
            help="Many prompts: a file with one a line, or - for stdin.",
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            min=1, show_default="all, up to 64", help="Texts that grow at once."
        ),
    ] = None,
    speculative: Annotated[
        int, typer.Option(min=0, help="Drafts a step, by the model's own head.")
    ] = 0,
    dtype: Annotated[
        str | None,
        typer.Option(
            show_default="float32 on a CPU, else the checkpoint's",
            help="float32 or bfloat16.",
        ),
    ] = None,
) -> None:
    """Writes text behind a prompt, by the shipped model or a checkpoint."""

    def leave(count: int) -> None:
        notes.show_cursor()
        ctrl_c.leave()

    def stop(count: int) -> None:
        if count > 1:
            leave(count)
        notes.print("stopping behind the call at hand; Ctrl-C again stops at once")

    try:
        # Up to the first call there is nothing to lose.
        with ctrl_c.Presses(leave) as presses:
            prompts = _prompts(prompt, batch, is_shipped=model is None)
            engine, tokenizer, requests = _begin(
                prompts,
                model,
                dtype,
                max_tokens=max_tokens,
                drafts=speculative,
                num_rows=rows,
                seed=seed,
                options=dict(temperature=temperature, top_p=top_p),
            )
            rates = Rates()
            presses.on_press = stop
            run = _run(engine, rates, presses)
            if len(requests) == 1:
                _stream(prompts[0], requests[0], tokenizer, run)
            else:
                _list(prompts, requests, tokenizer, run)
    except BrokenPipeError:
        # Python flushes at its end what nobody reads.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(BROKEN_PIPE) from None
    except (ValueError, OSError, MemoryError) as error:
        notes.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None
    accepted = f"{engine.figures.mean_accepted:.2f} tokens a step"
    notes.print(f"{rates}, {accepted}", style="dim")
    finished = sum(request.finish_reason is not None for request in requests)
    if finished < len(requests):
        notes.print(f"interrupted: {finished} of {len(requests)} texts are finished")
        raise typer.Exit(ctrl_c.EXIT)


def _begin(
    prompts: list[str],
    folder: pathlib.Path | None,
    dtype: str | None,
    *,
    max_tokens: int,
    seed: int,
    options: dict[str, Any],
    **sizes: Any,
) -> "tuple[Engine, Tokenizer, list[Request]]":
    """An engine that has compiled what it needs, with its requests."""
    # Here, since Flax takes a second that `check` and `info` need not wait.
    from gdn_jax.generation.api import make_engine, prompt_seed

    model, params, tokenizer = _load(folder, dtype)  # shows a bar of its own
    tokens = [tokenizer.encode(text) for text in prompts]
    engine = make_engine(model, params, tokens, max_tokens=max_tokens, **sizes)
    with notes.status("compiling"):
        _warm_up(engine, tokens, max_tokens, options)
    requests = [
        engine.submit(
            prompt, max_tokens=max_tokens, seed=prompt_seed(seed, i), **options
        )
        for i, prompt in enumerate(tokens)
    ]
    return engine, tokenizer, requests


def _prompts(
    prompt: str | None, batch: pathlib.Path | None, is_shipped: bool
) -> list[str]:
    if batch is None:
        if prompt is None and not is_shipped:
            raise ValueError("PROMPT is missing: what shall the text go on from?")
        return [PROMPT if prompt is None else prompt]
    if prompt is not None:
        raise ValueError("PROMPT and --batch exclude each other.")
    wanted = "it wants a text file with one prompt a line."
    try:
        is_stdin = str(batch) == "-"
        text = sys.stdin.read() if is_stdin else batch.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--batch {batch} is no UTF-8 ({error}); {wanted}") from None
    # not splitlines, which cuts at form feeds too
    prompts = [line for line in text.replace("\r\n", "\n").split("\n") if line]
    if not prompts:
        raise ValueError(f"--batch {batch} has no prompts; {wanted}")
    return prompts


def _load(
    folder: pathlib.Path | None, dtype: str | None
) -> "tuple[Any, Any, Tokenizer]":
    import jax

    from gdn_jax import models

    folder = models.SMALL if folder is None else folder
    if dtype is None and jax.default_backend() == "cpu":
        dtype = "float32"  # bfloat16 is emulated there
    return *models.load(folder, dtype=dtype), models.load_tokenizer(folder)


def _warm_up(
    engine: "Engine", prompts: list[list[int]], max_tokens: int, asked: dict[str, Any]
) -> None:
    """Compiles what prompts that are read at once need, so that the figures are of
    their work alone; of more, other lengths may still be compiled on the way."""
    for prompt in prompts[: engine.sizes.num_rows]:
        engine.submit(prompt, max_tokens=min(2, max_tokens), stop=(), **asked)
    for _ in engine.run():
        pass
    engine.figures = type(engine.figures)()


def _run(
    engine: "Engine", rates: Rates, presses: ctrl_c.Presses
) -> "Iterator[list[Request]]":
    """As `engine.run`. Ctrl-C ends it behind the call at hand, also where it comes
    while a caller shows what there is, so that all of it is shown."""
    while engine.requests and not presses.came:
        with rates.call(engine.figures):
            changed = engine.step()
        yield changed


def _stream(
    prompt: str,
    request: "Request",
    tokenizer: "Tokenizer",
    run: "Iterator[list[Request]]",
) -> None:
    """One text, as it comes."""

    def tokens() -> Iterator[int]:
        given = 0
        for _ in run:
            new = request.tokens[given:]
            given += len(new)
            yield from (token for token in new if token not in request.stop)

    sys.stdout.write(prompt)
    for piece in tokenizer.decode_stream(tokens()):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _list(
    prompts: list[str],
    requests: "list[Request]",
    tokenizer: "Tokenizer",
    run: "Iterator[list[Request]]",
) -> None:
    """Many texts, in the order of their prompts, behind a line of dashes each."""
    with notes.status("") as status:
        for _ in run:
            done = sum(request.finish_reason is not None for request in requests)
            tokens = sum(len(request.tokens) for request in requests)
            status.update(f"{done} of {len(requests)} texts, {tokens} tokens")
    for prompt, request in zip(prompts, requests, strict=True):
        if request.tokens:  # none: it was interrupted before it began
            kept = [token for token in request.tokens if token not in request.stop]
            sys.stdout.write(f"{'-' * 40}\n{prompt}{tokenizer.decode(kept)}\n")
