"""What a command says beside its results, on stderr; errors with their remedies."""

import contextlib
from collections.abc import Iterator

import typer
from rich.console import Console

notes = Console(stderr=True, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """Tells what is wrong with a command in a line, and ends it."""
    try:
        yield
    except BrokenPipeError:  # as by `| head`: Typer ends quietly
        raise
    except (ValueError, OSError, MemoryError) as error:
        notes.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None


@contextlib.contextmanager
def errors_of(option: str, path: object, wanted: str) -> Iterator[None]:
    """Says of a file's errors which option it is of, and what that wants."""
    try:
        yield
    except UnicodeDecodeError:
        fault = "Not in UTF-8"
    except OSError as error:
        fault = error.strerror
    except ValueError as error:  # with a remedy of its own
        raise ValueError(f"{option}: {error}") from None
    else:
        return
    raise ValueError(f"{option} {path}: {fault}. Wanted: {wanted}.")
