"""`gdn-jax generate`."""

import pathlib
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gdn_jax.cli.ctrl_c import STATUS, CtrlC
from gdn_jax.cli.notes import errors, errors_of, notes
from gdn_jax.cli.options import Decode, Dtype
from gdn_jax.cli.speeds import Speeds

if TYPE_CHECKING:
    from gdn_jax.generation.engine import Engine
    from gdn_jax.generation.requests import Request
    from gdn_jax.models.tokenizer import Tokenizer

PROMPT = "def read_"  # of the shipped model, which writes Python's documentation
WARNING = "stopping after the program at hand; press again to stop at once"


def _share(value: float) -> float:
    if not 0 < value <= 1:
        raise typer.BadParameter(f"{value:g} is not in (0, 1]. 1 leaves out none.")
    return value


def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="What the text goes on from. The shipped model's default: def read_"
        ),
    ] = None,
    model: Annotated[
        pathlib.Path | None,
        typer.Option(
            help="A local folder with a checkpoint, as `hf download` fills one. "
            "Default: the shipped small model."
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of each text.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, help="0: always the likeliest token.")
    ] = 0.7,
    top_p: Annotated[
        float,
        typer.Option(
            callback=_share,
            help="Only of the likeliest tokens of this share, in (0, 1].",
        ),
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed, the same texts.")] = 0,
    batch: Annotated[
        str | None,
        typer.Option(help="Many prompts: a file with one a line, or - for stdin."),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(min=1, help="Texts that grow at once. Default: all, up to 64."),
    ] = None,
    speculative: Annotated[
        int, typer.Option(min=0, max=8, help="Drafts a step, by the model's own head.")
    ] = 0,
    decode: Annotated[
        Decode | None,
        typer.Option(
            help="How a text's state goes on. Default: what was measured to be fastest "
            "for so many rows on this GPU; elsewhere in_place, with drafts checkpoints."
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Default: float32 on a CPU, else the checkpoint's."),
    ] = None,
) -> None:
    """Writes text behind a prompt, by the shipped model or a checkpoint."""
    with errors():
        if model is not None:
            _check_folder(model)
        if decode == Decode.in_place and speculative:
            raise ValueError(
                f"--decode in_place has no state to go back to when drafts are "
                f"rejected: with --speculative {speculative} use checkpoints or replay."
            )
        prompts = _prompts(prompt, batch, is_shipped=model is None)
        # Here, since Flax takes a second that `check` and `info` need not wait.
        from gdn_jax.generation.api import make_engine, prompt_seed

        network, params, tokenizer = _load(model, dtype)  # shows a bar of its own
        tokens = [tokenizer.encode(text) for text in prompts]
        engine = make_engine(
            network,
            params,
            tokens,
            max_tokens=max_tokens,
            drafts=speculative,
            decode=None if decode is None else decode.value,
            num_rows=rows,
        )
        asked: dict[str, Any] = dict(temperature=temperature, top_p=top_p)
        speeds = Speeds()
        with notes.status("compiling"):
            _warm_up(engine, tokens, max_tokens, asked)
        requests = [
            engine.submit(
                prompt, max_tokens=max_tokens, seed=prompt_seed(seed, i), **asked
            )
            for i, prompt in enumerate(tokens)
        ]
        show = _stream if len(requests) == 1 else _list
        with CtrlC(WARNING) as ctrl_c:
            show(prompts, requests, tokenizer, _run(engine, speeds, ctrl_c))
    finished = sum(request.finish_reason is not None for request in requests)
    if finished < len(requests):
        notes.print(f"interrupted: {finished} of {len(requests)} texts finished")
    if engine.figures.prefilled:
        notes.print(_report(speeds, engine), style="dim")
    if finished < len(requests):
        raise typer.Exit(STATUS)
    if any(request.finish_reason == "nan" for request in requests):
        notes.print("the model's logits are no numbers: is it broken?", style="red")
        raise typer.Exit(1)


def _report(speeds: Speeds, engine: "Engine") -> str:
    gained = f"{engine.figures.mean_accepted:.2f} tokens a step"
    return f"prefill {speeds.prefill}, decode {speeds.decode}, {gained}"


def _prompts(prompt: str | None, batch: str | None, is_shipped: bool) -> list[str]:
    if batch is None:
        if prompt is None and not is_shipped:
            raise ValueError("PROMPT is missing: what shall the text go on from?")
        return [PROMPT if prompt is None else _utf8(prompt)]
    if prompt is not None:
        raise ValueError("PROMPT and --batch exclude each other.")
    is_stdin = batch == "-"
    wanted = "UTF-8 text with a prompt a line, or - for stdin"
    with errors_of("--batch", batch, wanted):
        # -sig: without the mark that some editors begin a file with
        text = (
            sys.stdin.read() if is_stdin else pathlib.Path(batch).read_text("utf-8-sig")
        )
    # not splitlines, which cuts at form feeds too
    prompts = [line for line in text.replace("\r\n", "\n").split("\n") if line]
    if not prompts:
        raise ValueError(f"--batch {batch} has no prompts; it wants one a line.")
    return prompts


def _utf8(prompt: str) -> str:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # bytes that the locale has no characters for
        fault = f"PROMPT is no UTF-8 ({error.reason} at {error.start})."
        raise ValueError(f"{fault} Pass it in a file, by --batch.") from None
    return prompt


def _check_folder(folder: pathlib.Path) -> None:
    if not folder.is_dir():
        name = folder.as_posix()
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            name = "OWNER/NAME"
        raise ValueError(
            f"--model {folder}: there is no such folder. Wanted: a local one with the "
            f"files of a checkpoint; `hf download {name} --local-dir FOLDER` fills one."
        )


def _load(
    folder: pathlib.Path | None, dtype: Dtype | None
) -> "tuple[Any, Any, Tokenizer]":
    import jax

    from gdn_jax import models

    folder = models.SMALL if folder is None else folder
    if dtype is None and jax.default_backend() == "cpu":
        dtype = Dtype.float32  # bfloat16 is emulated there
    name = None if dtype is None else dtype.value
    return *models.load(folder, dtype=name), models.load_tokenizer(folder)


def _warm_up(
    engine: "Engine",
    prompts: list[list[int]],
    max_tokens: int,
    asked: dict[str, Any],
) -> None:
    """Compiles what prompts that are read at once need, so that their calls can be
    timed; of more, other lengths may still be compiled on the way."""
    for prompt in prompts[: engine.sizes.num_rows]:
        engine.submit(prompt, max_tokens=min(2, max_tokens), stop=(), **asked)
    for _ in engine.run():
        pass
    engine.figures = type(engine.figures)()


def _run(engine: "Engine", speeds: Speeds, ctrl_c: CtrlC) -> "Iterator[list[Request]]":
    """As `engine.run`, timed. Ctrl-C ends it behind the call at hand, also where it
    comes while a caller shows what there is, so that all of it is shown."""
    while engine.requests and not ctrl_c.came:
        yield speeds.step(engine)


def _stream(
    prompts: list[str],
    requests: "list[Request]",
    tokenizer: "Tokenizer",
    run: "Iterator[list[Request]]",
) -> None:
    """One text, as it comes."""
    [prompt], [request] = prompts, requests

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
    for number, (prompt, request) in enumerate(zip(prompts, requests, strict=True), 1):
        if not request.tokens:
            continue  # Ctrl-C came before it began
        kept = [token for token in request.tokens if token not in request.stop]
        sys.stdout.write(f"{'-' * 40}\n{prompt}{tokenizer.decode(kept)}\n")
        if request.finish_reason is None:
            sys.stdout.flush()  # the note is behind its text, where both are seen
            notes.print(f"[text {number} is unfinished]", style="dim", markup=False)
