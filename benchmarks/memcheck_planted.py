"""Writes past a buffer that memcheck must find before it is believed."""

import concurrent.futures
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import typer
from common import console
from memcheck_sanitizer import Watch, under_memcheck

from gdn_jax import _triton

# Whose buffers are allocations of their own, as long as they are: in a pool of JAX's a
# write past one is inside. Which of them are differs by JAX's version (`platform` is a
# pool since 0.10.1): the first is taken in which all that is planted is found.
ALLOCATORS = ("cuda_async", "address", "platform")
SIZE, BLOCK = 1000, 8192  # of the buffer and of the program that writes it
PLANTED = {"none": 0, "one value": 1, "many values": 4096}  # past the end


def plant(past: int) -> jax.Array:
    """A kernel of ours that writes its buffer, and so many values past its end."""

    def plant_kernel(x, out_ref):
        at = jnp.arange(BLOCK, dtype=jnp.int32)
        value = jnp.full((BLOCK,), 1.0) * _triton.load(x.at[0])
        _triton.store(out_ref.at[at], value, mask=at < SIZE + past)

    [out] = _triton.launch(
        plant_kernel,
        jnp.ones(1),
        (((SIZE,), jnp.float32),),
        grid=(1,),
        aliases={},
        num_warps=4,
        interpret=False,
    )
    return out


def find_allocator(
    folder: pathlib.Path, allocators: Sequence[str], is_ours: bool
) -> tuple[Watch, dict[str, Any]]:
    """(with the first allocator with which memcheck finds what is planted and nothing
    else, what it finds with each). Raises where there is none."""

    def run_one(allocator: str, name: str) -> dict[str, Any]:
        log = folder / f"plant_{allocator}_{name.replace(' ', '_')}.log"
        command = [sys.executable, __file__, name]
        return under_memcheck(command, log, Watch(allocator, is_ours), timeout=240)

    found: dict[str, dict[str, Any]] = {}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        runs = {
            (allocator, name): pool.submit(run_one, allocator, name)
            for allocator in allocators
            for name in PLANTED
        }
        for (allocator, name), future in runs.items():
            run = future.result()
            what = f"{allocator}: planted {name}: {run['errors']} errors"
            console.print(what, run["kinds"], markup=False)
            if run["errors"] is None:
                console.print(run["output"], run["lines"], markup=False)
            keys = ("errors", "kinds", "seconds")
            found.setdefault(allocator, {})[name] = {key: run[key] for key in keys}
    for allocator, planted in found.items():
        errors = {name: run["errors"] for name, run in planted.items()}
        if None not in errors.values() and all(
            (PLANTED[name] > 0) == (n > 0) for name, n in errors.items()
        ):
            return Watch(allocator, is_ours), found
    raise SystemExit("memcheck does not find what is planted, whatever the allocator")


def main(name: str) -> None:
    """Runs what is planted under that name, as memcheck's subject."""
    jax.block_until_ready(plant(PLANTED[name]))


if __name__ == "__main__":
    typer.run(main)
