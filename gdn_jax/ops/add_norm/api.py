"""What a layer adds, and the norm before the next: which implementation runs."""

import math

from jax import Array

from gdn_jax import _dispatch
from gdn_jax.ops import checks, vjp
from gdn_jax.ops.add_norm.call import Inputs, Options
from gdn_jax.ops.add_norm.triton import triton
from gdn_jax.ops.add_norm.xla import xla

MAX_ROWS = 256  # from where on XLA's launches are no longer what costs
MAX_SIZE = 16384  # values of a program


def add_norm(
    x: Array,
    parts: Array,
    weight: Array,
    *,
    eps: float,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """(x + y, norm of it), y the sum of parts.

        y = parts[0] + parts[1] + ..                  rounded to x's dtype, as x + y is
        norm(x) = x / sqrt(mean(x^2) + eps) * (1 + weight)           in float32

    Args:
      x: [..., D].
      parts: [S, ..., D], float32 or of x's dtype.
      weight: [D].
      eps: inside the root.
      implementation: "triton" (one launch, up to 256 rows), "interpret", "xla" or
        "reference" (one and the same); None: as in `products`.

    Returns:
      both of x's shape and dtype.

    Raises:
      ValueError: the call is wrong; the text names the argument and the remedy.
      NotImplementedError: the implementation asked for cannot run this call here.

    Transformations: as in `products`, but that parts are anything's.
    """
    _check(x, parts, weight)
    whole, options = Inputs(x, parts, weight), Options(float(eps))

    def kernel(interpret: bool) -> tuple[Array, Array]:
        D = x.shape[-1]
        rows = whole._replace(
            x=x.reshape(-1, D), parts=parts.reshape(parts.shape[0], -1, D)
        )
        summed, normed = vjp.launched(PATHS[interpret], options, None, rows)
        return summed.reshape(x.shape), normed.reshape(x.shape)

    return _dispatch.run_kernel_or_xla(
        "sum and norm",
        implementation,
        arrays=whole,
        why_not=lambda: why_not(x),
        kernel=kernel,
        xla=lambda: xla(whole, options),
    )


def _check(x: Array, parts: Array, weight: Array) -> None:
    if weight.shape != x.shape[-1:]:
        checks.fail("weight", weight.shape, f"[D] = {x.shape[-1:]}", "One a value.")
    if parts.shape[1:] != x.shape or parts.shape[0] == 0:
        wanted = f"[S, ..., D] with S >= 1, of {x.shape} each"
        checks.fail("parts", parts.shape, wanted, "Their sum is added to x.")


def why_not(x: Array) -> str | None:
    """Why the kernel cannot run a call, whatever the device; None where it can."""
    num_rows = math.prod(x.shape[:-1])
    if not 1 <= num_rows <= MAX_ROWS:
        return f"it takes 1 to {MAX_ROWS} rows; got {num_rows}"
    if not 1 <= x.shape[-1] <= MAX_SIZE:
        return f"it takes 1 to {MAX_SIZE} values a row; got {x.shape[-1]}"
    return None


PATHS = vjp.kernel_paths(triton, vjp.backward_of(xla))
