"""Products of few rows: which implementation runs."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gdn_jax import _dispatch
from gdn_jax.ops import vjp
from gdn_jax.ops.few_rows.call import Inputs, Options, total
from gdn_jax.ops.few_rows.triton import triton
from gdn_jax.ops.few_rows.tuning import MAX_ROWS, FewRowsConfig, heuristic
from gdn_jax.ops.few_rows.xla import xla

NARROW = {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}


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

        y_i = x @ matrices[i]                   gated: silu(x @ gate) * (x @ up)

    Decoding reads weights and little else. XLA makes a launch of each product, others
    to join matrices and to take products apart, and reads at 80% of the bandwidth.

    Args:
      x: [..., D].
      matrices: [D, F_i], of x's dtype; on one device.
      live: bool, of x's leading axes, or to be broadcast to them; rows where it is
        False are zeros, and NaN there reaches nothing. None: all count.
      gated: of two matrices, gate and up.
      parts: leave sums in the parts that the launch gives.
      implementation: "triton" (up to 128 rows of a 16-bit dtype), "interpret", "xla" or
        "reference" (both `jnp.dot`); None: triton where it can run and a process has
        one device, else xla.
      config: the kernel's launch; None takes a heuristic of the sizes.

    Returns:
      y_i [..., F_i] of x's dtype, one with `gated`. Sums are float32. With `parts`
      [S, ..., F_i], float32 if S > 1, whose sum over S y_i is.

    Raises:
      NotImplementedError: the implementation asked for cannot run this call here.
    """
    if live is not None:
        live = jnp.broadcast_to(live, x.shape[:-1]).astype(jnp.int32)
    whole, options = Inputs(x, tuple(matrices), live), Options(gated)
    inputs = whole._replace(
        x=x.reshape(-1, x.shape[-1]), live=None if live is None else live.ravel()
    )
    columns = tuple(matrix.shape[1] for matrix in matrices)

    def kernel(interpret: bool) -> tuple[Array, ...]:
        num_rows, D = inputs.x.shape
        launch = config or heuristic(num_rows, D, columns, gated=gated)
        path = INTERPRETED if interpret else COMPILED
        found = _launched(path, options, launch, inputs)
        return tuple(y.reshape(-1, *x.shape[:-1], y.shape[-1]) for y in found)

    found = _dispatch.run_kernel_or_xla(
        implementation,
        arrays=inputs,
        why_not=why_not(x, matrices),
        kernel=kernel,
        xla=lambda: in_one_part(xla(whole, options)),
    )
    return found if parts else tuple(total(y, x.dtype) for y in found)


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


COMPILED = vjp.Path(triton, _backward)
INTERPRETED = vjp.Path(functools.partial(triton, interpret=True), COMPILED.backward)

_launched = jax.jit(vjp.differentiable, static_argnums=(0, 1, 2))
