"""Full attention with an output gate, its cache passed in and returned."""

from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from gdn_jax import _types as t
from gdn_jax._dispatch import where_it_can
from gdn_jax.nn.initializers import Initializer
from gdn_jax.nn.norm import RMSNorm
from gdn_jax.nn.projections import Matrices, flat, multiply
from gdn_jax.nn.rope import rotate
from gdn_jax.ops import checks
from gdn_jax.ops.cached_attention.api import cached_attention, why_not
from gdn_jax.ops.cached_attention.call import Inputs
from gdn_jax.ops.few_rows.call import total


class KVCache(NamedTuple):
    """Keys and values of earlier tokens, a row for each sequence.

    Attributes:
      k, v: [P, heads, M, head_dim]; M positions, of which a row's tokens fill the
        first. v is finite: a value that is not is kept as 0, and its key as NaN, which
        reaches those that attend to it and no others.
    """

    k: Array
    v: Array


class GatedAttention(nn.Module):
    """Causal grouped-query attention with norms of q and k, and an output gate.

        q, gate = projection(x), by heads;  k, v = projections(x)
        q, k = rope(norm(q)), rope(norm(k))
        y = projection(attention(q, k, v) * sigmoid(gate))

    As in Qwen3-Next and Qwen3.5 (transformers 5.23): the norms are zero-centred, over
    each head's features, and rope turns the first of them.

    Attributes:
      hidden_size: D, of x and y.
      num_heads, num_kv_heads: of q, and of k and v; the first a multiple of the second.
      head_dim: features of a head.
      rotary_dim: features that rope turns; even.
      rope_theta: base of rope's wavelengths.
      norm_eps: of the norms of q and k.
      dtype: of everything but norms, rope and softmax, which are float32 inside.
      param_dtype: of parameters.
      kernel_init: of the projections.
      attention: `implementation` of `jax.nn.dot_product_attention`, "xla" or "cudnn";
        then it is also what attends to a cache. None: its own choice, and a kernel that
        reads no more of a cache than is filled.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float = 1e7
    norm_eps: float = 1e-6
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.normal(0.02)
    attention: Literal["xla", "cudnn"] | None = None

    def __post_init__(self):
        for name in ("hidden_size", "num_heads", "num_kv_heads", "head_dim"):
            checks.count(name, getattr(self, name), "It is an axis.")
        if self.num_heads % self.num_kv_heads:
            wanted = f"a multiple of num_kv_heads = {self.num_kv_heads}"
            remedy = "Each head of k and v serves as many heads of q."
            checks.fail("num_heads", self.num_heads, wanted, remedy)
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.head_dim:
            wanted = f"even, at most head_dim = {self.head_dim}"
            checks.fail("rotary_dim", self.rotary_dim, wanted, "Rope turns pairs.")
        super().__post_init__()

    def setup(self):
        matrices = Matrices(self.dtype, self.param_dtype, self.kernel_init)
        width = self.num_heads * self.head_dim
        kv_width = self.num_kv_heads * self.head_dim
        self.q = matrices.dense(2 * width, "embed", "heads")
        self.k = matrices.dense(kv_width, "embed", "kv_heads")
        self.v = matrices.dense(kv_width, "embed", "kv_heads")
        self.out = matrices.dense(self.hidden_size, "heads", "embed")
        norm = (self.head_dim, self.norm_eps, self.dtype, self.param_dtype)
        self.q_norm = RMSNorm(*norm)
        self.k_norm = RMSNorm(*norm)

    def __call__(
        self,
        x: t.Hidden,
        cache: KVCache | None = None,
        *,
        start: Array | None = None,
        rows: Array | None = None,
        num_tokens: Array | None = None,
        implementation: str | None = None,
    ) -> tuple[t.Hidden, KVCache | None]:
        """Each token attends to itself and to those before it: (y, cache).

        Args:
          x: [N, T, D].
          cache: from `init_cache` or the last call; donated under `jax.jit` it is
            updated in place. None: the tokens are the whole sequence.
          start: [N] int32, how many tokens are before x's first; these are in the
            cache. Entries from there on are overwritten, so that tokens can be taken
            back.
          rows: [N] int32, each sequence's row of the cache. None: row n is sequence
            n.
          num_tokens: [N] int32, how many of the T tokens count; the others are not kept
            and their y means nothing. None: all.
          implementation: of projections and of attention to a cache, as in
            `fused_update`. Their kernels are for a few tokens of a 16-bit dtype; what
            they cannot take is XLA's.

        A token past the cache's M positions is not kept.

        Returns:
          y: like x, in `dtype`.
          cache: with the tokens' keys and values; None if that was None.
        """
        parts, cache = self.parts(
            x,
            cache,
            start=start,
            rows=rows,
            num_tokens=num_tokens,
            implementation=implementation,
        )
        return total(parts, self.dtype), cache

    def parts(
        self,
        x: t.Hidden,
        cache: KVCache | None = None,
        *,
        start: Array | None = None,
        rows: Array | None = None,
        num_tokens: Array | None = None,
        implementation: str | None = None,
    ) -> tuple[Array, KVCache | None]:
        """As the call, but y in parts [S ..] whose sum it is, for what sums anyway."""
        if cache is None:
            for name, table in (("rows", rows), ("num_tokens", num_tokens)):
                if table is not None:
                    remedy = "Make one with init_cache."
                    checks.fail("cache", "None", f"given with {name}", remedy)
        N, T, _ = x.shape
        first = jnp.zeros((1,), jnp.int32) if start is None else start
        positions = first[:, None] + jnp.arange(T, dtype=jnp.int32)
        q, k, v, gate = self._project(x, positions, implementation)
        if cache is None:
            out = jax.nn.dot_product_attention(
                q, k, v, is_causal=True, implementation=self.attention
            )
        else:
            positions = jnp.broadcast_to(positions, (N, T))
            cache = _write(cache, k, v, positions, rows, num_tokens)
            out = self._attend_to(cache, q, rows, positions[:, 0], implementation)
        y = flat(out * jax.nn.sigmoid(gate))
        return self.out.parts(y, implementation), cache

    @nn.nowrap
    def init_cache(self, num_rows: int, num_positions: int) -> KVCache:
        """An empty cache: P rows with room for M positions each."""
        shape = (num_rows, self.num_kv_heads, num_positions, self.head_dim)
        return KVCache(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))

    def _project(
        self, x: Array, positions: Array, implementation: str | None
    ) -> tuple[Array, ...]:
        N, T, _ = x.shape
        q, k, v = multiply(x, self.q, self.k, self.v, implementation=implementation)
        q, gate = jnp.split(q.reshape(N, T, self.num_heads, -1), 2, axis=-1)
        k, v = (y.reshape(N, T, self.num_kv_heads, -1) for y in (k, v))
        rope: dict[str, Any] = dict(size=self.rotary_dim, theta=self.rope_theta)
        q = rotate(self.q_norm(q), positions, **rope)
        return q, rotate(self.k_norm(k), positions, **rope), v, gate

    def _attend_to(
        self,
        cache: KVCache,
        q: Array,
        rows: Array | None,
        start: Array,
        implementation: str | None,
    ) -> Array:
        call = Inputs(q, *cache, rows, start)
        return cached_attention(
            call,
            attention=self.attention,
            implementation=where_it_can(
                implementation, call, lambda: why_not(call, self.attention)
            ),
        )


def _write(
    cache: KVCache,
    k: Array,
    v: Array,
    positions: Array,
    rows: Array | None,
    num_tokens: Array | None,
) -> KVCache:
    """The cache with new tokens at their positions, and a value that is not finite told
    by its key."""
    N, T = positions.shape
    if rows is None:
        rows = jnp.arange(N, dtype=jnp.int32)
    if num_tokens is not None:
        kept = jnp.arange(T, dtype=jnp.int32) < num_tokens[:, None]
        positions = jnp.where(kept, positions, cache.k.shape[2])  # out of it: dropped
    where = rows[:, None], slice(None), positions
    # A mask keeps out keys that a former sequence left; of its values nothing but a
    # weight of zero does, so that they must be finite.
    k, v = k.astype(cache.k.dtype), v.astype(cache.v.dtype)
    is_finite = jnp.isfinite(v)
    k, v = jnp.where(is_finite, k, jnp.nan), jnp.where(is_finite, v, 0)
    return KVCache(
        cache.k.at[where].set(k, mode="drop"), cache.v.at[where].set(v, mode="drop")
    )
