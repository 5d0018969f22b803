"""Attention of new tokens to a cache: which implementation runs."""

from jax import Array
from jax.experimental import pallas as pl

from gdn_jax import _dispatch
from gdn_jax.ops import checks, vjp
from gdn_jax.ops.blocks import MIN_DOT, NARROW
from gdn_jax.ops.cached_attention.call import Inputs, Options
from gdn_jax.ops.cached_attention.triton import triton
from gdn_jax.ops.cached_attention.tuning import (
    MAX_QUERIES,
    AttentionConfig,
    heuristic,
)
from gdn_jax.ops.cached_attention.xla import xla

MAX_DIM = 256


def cached_attention(
    x: Inputs,
    *,
    attention: str | None = None,
    implementation: str | None = None,
    config: AttentionConfig | None = None,
) -> Array:
    """Each new token attends to the cache up to itself (flash decoding).

        out[n, t] = softmax(q[n, t] k^T / sqrt(head_dim)) v
                    over the positions 0 .. start[n] + t of row rows[n]

    Args:
      x: the new tokens' keys and values are in the cache. Every v in it is finite;
        keys in unreached positions may be anything, but for gradients, which want
        them finite.
      attention: `implementation` of `jax.nn.dot_product_attention` where it runs.
      implementation: "triton" (reads the positions that there are; a few tokens of a
        16-bit dtype), "interpret", "xla" or "reference" (both
        `jax.nn.dot_product_attention`, which reads all of the cache); None: triton
        where it can run, `attention` does not ask for another and a process has one
        device, else xla.
      config: the kernel's launch; None takes a heuristic of the sizes.

    Returns:
      [N, T, heads, head_dim] in q's dtype.

    Raises:
      ValueError: the call is wrong; the text names the argument and the remedy.
      NotImplementedError: the implementation asked for cannot run this call here.

    Transformations: as in `products`.
    """
    _check(x)
    _dispatch.check_config(config, AttentionConfig, implementation)
    options = Options(attention)

    def kernel(interpret: bool) -> Array:
        launch = config or heuristic(x.q.shape[0], *x.k.shape[1:3])
        return vjp.launched(PATHS[interpret], options, launch, x)

    return _dispatch.run_kernel_or_xla(
        "attention to a cache",
        implementation,
        arrays=x,
        why_not=lambda: why_not(x, attention),
        kernel=kernel,
        xla=lambda: xla(x, options),
    )


def _check(x: Inputs) -> None:
    N, _, num_heads, dim = x.q.shape
    num_rows, num_kv_heads, _, _ = x.k.shape
    if x.v.shape != x.k.shape or x.k.shape[3] != dim:
        wanted = f"[P, kv_heads, M, {dim}], one as the other"
        checks.fail("k and v", (x.k.shape, x.v.shape), wanted, "As q's features.")
    if num_heads % num_kv_heads:
        wanted = f"a multiple of kv_heads = {num_kv_heads}"
        checks.fail("q's heads", num_heads, wanted, "Each of k serves as many of q.")
    if x.rows is None and num_rows != N:
        remedy = "Name each sequence's row in rows."
        checks.fail("k", x.k.shape, f"of P = N = {N} where rows is None", remedy)
    for name, value in dict(rows=x.rows, start=x.start).items():
        if value is not None and value.shape != (N,):
            checks.fail(name, value.shape, f"[N] = ({N},)", "One a sequence.")


def why_not(x: Inputs, attention: str | None = None) -> str | None:
    """Why the kernel cannot run a call, whatever the device; None where it can."""
    T, num_heads, dim = x.q.shape[1:]
    queries = T * num_heads // x.k.shape[1]
    dtypes = {x.q.dtype, x.k.dtype, x.v.dtype}
    if 0 in (*x.q.shape, *x.k.shape):
        return "an axis is empty"
    if attention is not None:
        return f"attention = {attention!r} asks for another implementation"
    if queries > MAX_QUERIES:
        return f"it takes up to {MAX_QUERIES} queries of a key head; got {queries}"
    if pl.next_power_of_2(dim) != dim or not MIN_DOT <= dim <= MAX_DIM:
        return f"head_dim must be a power of two, {MIN_DOT} to {MAX_DIM}; got {dim}"
    if len(dtypes) > 1 or not dtypes <= NARROW:
        return f"it takes bfloat16 or float16; got {', '.join(map(str, dtypes))}"
    return None


PATHS = vjp.kernel_paths(triton, vjp.backward_of(xla))
