"""Products of few rows: which implementation runs."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from gdn_jax import _dispatch, _triton
from gdn_jax.ops import vjp
from gdn_jax.ops.few_rows.call import Inputs, Options
from gdn_jax.ops.few_rows.triton import triton
from gdn_jax.ops.few_rows.tuning import MAX_ROWS, FewRowsConfig, heuristic
from gdn_jax.ops.few_rows.xla import xla

NARROW = {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}


def products(
    x: Array,
    matrices: Sequence[Array],
    *,
    gated: bool = False,
    implementation: str | None = None,
    config: FewRowsConfig | None = None,
) -> tuple[Array, ...]:
    """Each row by each matrix, in one launch where rows are few.

        y_i = x @ matrices[i]                   gated: silu(x @ gate) * (x @ up)

    Decoding reads weights and little else. XLA makes a launch of each product, others
    to join matrices and to take products apart, and reads at 80% of the bandwidth.

    Args:
      x: [..., D].
      matrices: [D, F_i], of x's dtype; on one device.
      gated: of two matrices, gate and up.
      implementation: "triton" (up to 64 rows of a 16-bit dtype), "interpret", "xla" or
        "reference" (both `jnp.dot`); None: triton where it can run, else xla. Where a
        process has several devices, None is xla: XLA shards matrices and does not tell,
        and would gather them for a kernel. Inside of `shard_map` they are whole.
      config: the kernel's launch; None takes a heuristic of the sizes.

    Returns:
      y_i [..., F_i] of x's dtype, one with `gated`. Sums are float32.

    Raises:
      NotImplementedError: the implementation asked for cannot run this call here.
    """
    whole, options = Inputs(x, tuple(matrices)), Options(gated)
    inputs = whole._replace(x=x.reshape(-1, x.shape[-1]))
    columns = tuple(matrix.shape[1] for matrix in matrices)
    if implementation is None and not _triton.is_whole():
        implementation = "xla"

    def run_triton() -> tuple[Array, ...]:
        _triton.device_kind(inputs)
        return run_kernel(COMPILED)

    def run_kernel(path: vjp.Path) -> tuple[Array, ...]:
        reason = why_not(x, matrices)
        if reason is not None:
            raise NotImplementedError(f"the kernel of few rows cannot run: {reason}.")
        launch = config or heuristic(x.shape[-1], columns, gated=gated)
        found = _launched(path, options, launch, inputs)
        return tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in found)

    paths: dict[str, Callable[[], tuple[Array, ...]]] = {
        "triton": run_triton,
        "interpret": lambda: run_kernel(INTERPRETED),
        "xla": lambda: xla(whole, options),
        "reference": lambda: xla(whole, options),
    }
    return _dispatch.run(paths, implementation)


def why_not(x: Array, matrices: Sequence[Array]) -> str | None:
    """Why the kernel cannot run a call, whatever the device; None where it can."""
    num_rows = math.prod(x.shape[:-1])
    dtypes = {array.dtype for array in (x, *matrices)}
    if not 1 <= num_rows <= MAX_ROWS:
        return f"it takes 1 to {MAX_ROWS} rows; got {num_rows}"
    if 0 in (x.shape[-1], *(matrix.shape[1] for matrix in matrices)):
        return "an axis is empty"
    if len(dtypes) > 1 or not dtypes <= NARROW:
        return f"it takes bfloat16 or float16; got {', '.join(map(str, dtypes))}"
    return None


COMPILED = vjp.Path(triton, vjp.backward_of(xla))
INTERPRETED = vjp.Path(functools.partial(triton, interpret=True), COMPILED.backward)

_launched = jax.jit(vjp.differentiable, static_argnums=(0, 1, 2))
