"""What calls compute-sanitizer's memcheck, and reads its log."""

import collections
import os
import pathlib
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    # XLA's search for fast products runs hundreds of kernels that are not ours.
    "XLA_FLAGS": "--xla_gpu_autotune_level=0",
    "PYTHONUNBUFFERED": "1",
}
# Memory behind every allocation that nothing may touch: a write far past one does not
# land in the next.
PADDING = 4096
# An error ends a process; the kernel that is planted shows that ours are still watched.
NOT_WATCHED = {
    "kernel": "input_scatter_fusion",
    "reason": (
        "XLA's own of scatters, by which tests make arrays, reads indices for threads "
        "that have none, up to 8 values past their end (JAX 0.11.2)"
    ),
}
OURS = "_kernel"  # in the name of every kernel of this project
SHOWN_LINES = 40


def environment(allocator: str) -> dict[str, str]:
    return {"XLA_PYTHON_CLIENT_ALLOCATOR": allocator} | ENVIRONMENT


class Watch(NamedTuple):
    """How tests are run: with which of JAX's allocators, and which kernels memcheck
    looks at."""

    allocator: str
    is_ours: bool = False

    @property
    def words(self) -> tuple[str, str]:
        if self.is_ours:
            return "--kernel-name", f"kns={OURS}"
        return "--kernel-name-exclude", f"kns={NOT_WATCHED['kernel']}"

    @property
    def text(self) -> str:
        if self.is_ours:
            return f"kernels with {OURS} in their names, which are all of gdn_jax's"
        return f"all kernels but {NOT_WATCHED['kernel']}"


def find_sanitizer() -> str:
    places = [shutil.which("compute-sanitizer")]
    places += map(str, sorted(pathlib.Path("/usr/local").glob("cuda*/bin/*sanitizer")))
    for place in filter(None, places):
        return place
    raise SystemExit("compute-sanitizer is not on PATH nor under /usr/local/cuda*/bin")


def version() -> str:
    command = [find_sanitizer(), "--version"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout.strip().splitlines()[-1] if run.stdout.strip() else ""


def under_memcheck(
    command: list[str],
    log: pathlib.Path,
    watch: Watch,
    timeout: float,
    more: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Runs it; what memcheck says: `errors` is None where it said no summary."""
    sanitizer = [
        find_sanitizer(),
        *("--tool", "memcheck", "--report-api-errors", "no"),
        *watch.words,
        *("--padding", str(PADDING), "--log-file", str(log)),
    ]
    begun = time.perf_counter()
    try:
        run = subprocess.run(
            [*sanitizer, *command],
            cwd=ROOT,
            env={**os.environ, **environment(watch.allocator), **more},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        code, output = run.returncode, run.stdout[-4000:] + run.stderr[-4000:]
    except subprocess.TimeoutExpired as late:
        code, output = None, str(late)[:200]
    seconds = round(time.perf_counter() - begun, 1)
    said = log.read_text(errors="replace") if log.exists() else ""
    return {"code": code, "seconds": seconds} | summary(said) | {"output": output}


def summary(said: str) -> dict[str, Any]:
    """Of memcheck's log."""
    counts = [int(n) for n in re.findall(r"ERROR SUMMARY: (\d+) error", said)]
    lines = [line.removeprefix("=========").strip() for line in said.splitlines()]
    kinds = collections.Counter(
        line for line in lines if re.match(r"(Invalid|Misaligned|Out-of-range) ", line)
    )
    at = re.findall(r"^=+ +at (\S+?)\+0x", said, flags=re.MULTILINE)
    has_errors = sum(counts) > 0 or bool(kinds)
    return {
        "errors": max(sum(counts), kinds.total()) if counts or kinds else None,
        "kinds": dict(kinds.most_common(20)),
        "kernels": dict(collections.Counter(at).most_common(20)),
        "lines": lines[:SHOWN_LINES] if has_errors or not counts else [],
    }
