"""Products of few rows: which implementation runs."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from gdn_jax import _dispatch, _triton
from gdn_jax.ops import checks, vjp
from gdn_jax.ops.blocks import NARROW
from gdn_jax.ops.few_rows.call import Inputs, Options, total
from gdn_jax.ops.few_rows.triton import triton
from gdn_jax.ops.few_rows.tuning import MAX_ROWS, FewRowsConfig, heuristic
from gdn_jax.ops.few_rows.xla import xla


def products(
    x: Array,
    matrices: Sequence[Array],
    *,
    live: Array | None = None,
    gated: bool = False,
    parts: bool = False,
    implementation: str | None = None,
    config: FewRowsConfig | None = None,
) -> tuple[Array, ...]:
    """Each row by each matrix, in one launch where rows are few.

        y_i = x @ matrices[i]           gated (SwiGLU): silu(x @ gate) * (x @ up)

    Decoding reads weights and little else. XLA makes a launch of each product, others
    to join matrices and to take products apart, and reads at 80% of the bandwidth.

    Args:
      x: [..., D].
      matrices: [D, F_i], on one device.
      live: bool, of x's leading axes, or to be broadcast to them; rows where it is
        False are zeros, and NaN there reaches nothing. None: all count.
      gated: of two matrices of one shape, gate and up.
      parts: leave sums in the parts that the launch gives (split-K).
      implementation: "triton" (up to 128 rows of a 16-bit dtype), "interpret", "xla" or
        "reference" (both `jnp.dot`); None: triton where it can run and a process has
        one device, else xla.
      config: the kernel's launch; None takes a heuristic of the sizes.

    Returns:
      y_i [..., F_i] of x's dtype, one with `gated`. Sums are float32. With `parts`
      [S, ..., F_i], float32 if S > 1, whose sum over S y_i is.

    Raises:
      ValueError: the call is wrong; the text names the argument and the remedy.
      NotImplementedError: the implementation asked for cannot run this call here.

    Transformations: `jax.grad` runs XLA's products backward, and takes it that parts
    are summed. `vmap` launches the kernel for every entry: make rows of them instead.
    """
    _check(x, matrices, gated, config)
    _dispatch.check_config(config, FewRowsConfig, implementation)
    if live is not None:
        live = jnp.broadcast_to(live, x.shape[:-1]).astype(jnp.int32)
    whole, options = Inputs(x, tuple(matrices), live), Options(gated)
    inputs = whole._replace(
        x=x.reshape(-1, x.shape[-1]), live=None if live is None else live.ravel()
    )
    columns = tuple(matrix.shape[1] for matrix in matrices)

    def kernel(interpret: bool) -> tuple[Array, ...]:
        num_rows, D = inputs.x.shape
        room = _triton.shared_memory(inputs)
        launch = config or heuristic(num_rows, D, columns, room, gated=gated)
        found = vjp.launched(PATHS[interpret], options, launch, inputs)
        return tuple(y.reshape(-1, *x.shape[:-1], y.shape[-1]) for y in found)

    found = _dispatch.run_kernel_or_xla(
        "products of few rows",
        implementation,
        arrays=inputs,
        why_not=lambda: why_not(x, matrices),
        kernel=kernel,
        xla=lambda: in_one_part(xla(whole, options)),
    )
    return found if parts else tuple(total(y, x.dtype) for y in found)


def _check(
    x: Array, matrices: Sequence[Array], gated: bool, config: FewRowsConfig | None
) -> None:
    D = x.shape[-1]
    for i, matrix in enumerate(matrices):
        if matrix.ndim != 2 or matrix.shape[0] != D:
            wanted, remedy = f"[D, F] with D = {D}", "Rows of x are multiplied by it."
            checks.fail(f"matrices[{i}]", matrix.shape, wanted, remedy)
    shapes = [matrix.shape for matrix in matrices]
    if gated and (len(shapes) != 2 or shapes[0] != shapes[1]):
        checks.fail("matrices", shapes, "two of one shape", "They are gate and up.")
    if gated and config is not None and config.splits > 1:
        remedy = "What is gated are whole sums."
        checks.fail("config.splits", config.splits, "1 with gated", remedy)


def in_one_part(found: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(y[None] for y in found)


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


def _backward(x: Inputs, options: Options, config: Any, cotangents: Any) -> Inputs:
    """Of parts whose sum alone is used, so that all have its cotangent."""
    of_sums = tuple(parts[0].astype(x.x.dtype) for parts in cotangents)
    return vjp.backward_of(xla)(x, options, config, of_sums)


PATHS = vjp.kernel_paths(triton, _backward)
