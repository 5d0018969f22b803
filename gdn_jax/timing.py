"""Time on the device, from the profiler: what a kernel takes, without its dispatch."""

import contextlib
import dataclasses
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Kernel:
    name: str
    start_us: float
    duration_us: float


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds of one call: the sum of its kernels, over repeated calls."""

    median_us: float
    min_us: float
    max_us: float
    kernels: int


@contextlib.contextmanager
def record() -> Iterator[list[Kernel]]:
    """The device's kernels and copies, in order, once the block has been left.

    The block must wait for what it launched. Empty on a machine without a GPU.
    """
    kernels: list[Kernel] = []
    options = jax.profiler.ProfileOptions()
    # what Python does and every compiled program's text take seconds to write
    options.python_tracer_level = 0
    options.enable_hlo_proto = False
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            yield kernels
        for path in pathlib.Path(folder).rglob("*.xplane.pb"):
            kernels += _device_events(path)
    kernels.sort(key=lambda kernel: kernel.start_us)


def _device_events(path: pathlib.Path) -> list[Kernel]:
    profile = jax.profiler.ProfileData.from_file(str(path))
    return [
        Kernel(event.name, event.start_ns / 1e3, event.duration_ns / 1e3)
        for plane in profile.planes
        if "GPU" in plane.name
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]


def measure(
    run: Callable[[int], object],
    repeats: int,
    *,
    wait: Callable[[], None],
    belongs: Callable[[str], bool] = lambda name: True,
) -> Timing:
    """Times `run(0)`, `run(1)`, ...; every call must launch the same kernels.

    Let successive calls touch memory larger than the L2 cache. `belongs` picks kernels
    by name; `wait` blocks until the device is idle.
    """
    run(0)
    wait()
    with record() as kernels:
        for i in range(repeats):
            run(i)
        wait()
    mine = [kernel for kernel in kernels if belongs(kernel.name)]
    if not mine or len(mine) % repeats:
        raise RuntimeError(
            f"{len(mine)} kernels in {repeats} calls: "
            f"{sorted({kernel.name for kernel in kernels})}"
        )
    each = len(mine) // repeats
    calls = [
        sum(kernel.duration_us for kernel in mine[i : i + each])
        for i in range(0, len(mine), each)
    ]
    return Timing(statistics.median(calls), min(calls), max(calls), each)


def copy_bandwidth() -> float:
    """TB/s, read plus written, of an in-place scaling of 1 GiB of random numbers."""
    scale = jax.jit(lambda x: x * jnp.float32(1.0001), donate_argnums=0)
    held = {"x": jax.random.normal(jax.random.key(0), (2**28,))}

    def run(_: int) -> None:
        held["x"] = jax.block_until_ready(scale(held["x"]))

    return 2 * 2**30 / measure(run, 10, wait=lambda: None).median_us / 1e6
