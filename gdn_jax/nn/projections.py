"""The projections of a token, laid out as checkpoints have them: one module each."""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from gdn_jax import _types as t
from gdn_jax.nn.initializers import Initializer


@dataclasses.dataclass(frozen=True)
class Heads:
    """How many heads of which dims; the letters of _types.py."""

    H: int
    HV: int
    K: int
    V: int

    @property
    def group(self) -> int:
        """Value heads of one key head."""
        return self.HV // self.H

    @property
    def channels(self) -> int:
        """C: q, k and v, flat."""
        return 2 * self.H * self.K + self.HV * self.V

    def split(self, channels: Array) -> tuple[Array, Array, Array]:
        """q, k [.. H K] and v [.. HV V] of channels [.. C]."""
        keys = self.H * self.K
        q, k, v = jnp.split(channels, [keys, 2 * keys], axis=-1)
        return (
            _per_head(q, self.H),
            _per_head(k, self.H),
            _per_head(v, self.HV),
        )


class Projected(NamedTuple):
    """What one token is projected to.

    Attributes:
      channels: [.. C], q, k and v before the convolution, flat.
      z: [.. HV V], the output gate.
      a: [.. HV], the decay's logits; [.. HV K] with per-K decay.
      b: [.. HV], beta's logits.
    """

    channels: Array
    z: Array
    a: Array
    b: Array


@dataclasses.dataclass(frozen=True)
class Matrices:
    """How projections are made; the fields are `GatedDeltaNet`'s."""

    dtype: Any
    param_dtype: Any
    kernel_init: Initializer

    def dense(self, features: int, *axes: str | None) -> nn.Dense:
        return nn.Dense(
            features,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.with_logical_partitioning(self.kernel_init, axes),
            dot_general=multiply,
        )


# Values of a matrix: below the first they are not worth a launch more, from the second
# on XLA multiplies one row as well as two.
FEW_VALUES, MANY_VALUES = 2**20, 10 * 2**20


def multiply(x: Array, matrix: Array, dimension_numbers: Any, **options: Any) -> Array:
    """`lax.dot_general`, some single rows of x with another of zeros.

    On a GPU XLA takes one row and such a matrix for a sum of products, which it writes
    to memory first: 32 us instead of 6 for [4096 1024] (JAX 0.11.2, H100).
    """
    dot = functools.partial(
        lax.dot_general, dimension_numbers=dimension_numbers, **options
    )
    is_row = x.ndim >= 2 and x.size == x.shape[-1]
    if not is_row or not FEW_VALUES <= matrix.size < MANY_VALUES:
        return dot(x, matrix)

    def of_two_rows(x: Array, matrix: Array) -> Array:
        return dot(jnp.pad(x, [(0, 1), *[(0, 0)] * (x.ndim - 1)]), matrix)[:1]

    return lax.platform_dependent(x, matrix, cuda=of_two_rows, default=dot)


class LowRank(nn.Module):
    """A projection to value heads through `rank` features."""

    features: int
    rank: int
    matrices: Matrices

    def setup(self):
        self.down = self.matrices.dense(self.rank, "embed", None)
        self.up = self.matrices.dense(self.features, None, "gdn_value_heads")

    def __call__(self, x: Array) -> Array:
        return self.up(self.down(x))


class Layout(nn.Module):
    """What the layouts share.

    Attributes:
      heads: numbers and dims of heads.
      matrices: how the projections are made.
      per_key_decay: `a` has an entry for each K.
      gate_rank: if given, `a` and `z` are projected through so many features.
    """

    heads: Heads
    matrices: Matrices
    per_key_decay: bool
    gate_rank: int | None

    def gate(self, features: int) -> nn.Module:
        if self.gate_rank is None:
            return self.matrices.dense(features, "embed", "gdn_value_heads")
        return LowRank(features, self.gate_rank, self.matrices)

    def gates_and_beta(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The projections of z, a and b, where they are matrices of their own."""
        HV, K, V = self.heads.HV, self.heads.K, self.heads.V
        z = self.gate(HV * V)
        a = self.gate(HV * K if self.per_key_decay else HV)
        return z, a, self.matrices.dense(HV, "embed", "gdn_value_heads")

    def project_gates(self, x: Array) -> tuple[Array, Array, Array]:
        z = _per_head(self.z(x), self.heads.HV)
        a = self.a(x)
        return z, _per_head(a, self.heads.HV) if self.per_key_decay else a, self.b(x)


class Interleaved(Layout):
    """Two matrices, by key heads: [q | k | v | z] and [b | a] (Qwen3-Next)."""

    def setup(self):
        H, group, K, V = self.heads.H, self.heads.group, self.heads.K, self.heads.V
        per_key_head = 2 * K + 2 * group * V
        self.qkvz = self.matrices.dense(H * per_key_head, "embed", "gdn_key_heads")
        self.ba = self.matrices.dense(H * 2 * group, "embed", "gdn_key_heads")

    def __call__(self, x: t.Hidden) -> Projected:
        H, HV, K, V = dataclasses.astuple(self.heads)
        ends = [K, 2 * K, 2 * K + self.heads.group * V]
        *qkv, z = jnp.split(_per_head(self.qkvz(x), H), ends, axis=-1)
        b, a = jnp.split(_per_head(self.ba(x), H), 2, axis=-1)
        channels = jnp.concatenate([flat(part) for part in qkv], axis=-1)
        return Projected(channels, _per_head(flat(z), HV), flat(a), flat(b))


class Flat(Layout):
    """One matrix for [q | k | v], one each for z, b and a (Qwen3.5)."""

    def setup(self):
        self.qkv = self.matrices.dense(self.heads.channels, "embed", "gdn_channels")
        self.z, self.a, self.b = self.gates_and_beta()

    def __call__(self, x: t.Hidden) -> Projected:
        return Projected(self.qkv(x), *self.project_gates(x))


class Separate(Layout):
    """A matrix each for q, k, v, z, b and a (OLMo-hybrid, Kimi-Linear)."""

    def setup(self):
        H, HV, K, V = dataclasses.astuple(self.heads)
        self.q = self.matrices.dense(H * K, "embed", "gdn_key_heads")
        self.k = self.matrices.dense(H * K, "embed", "gdn_key_heads")
        self.v = self.matrices.dense(HV * V, "embed", "gdn_value_heads")
        self.z, self.a, self.b = self.gates_and_beta()

    def __call__(self, x: t.Hidden) -> Projected:
        channels = jnp.concatenate([self.q(x), self.k(x), self.v(x)], axis=-1)
        return Projected(channels, *self.project_gates(x))


LAYOUTS = {"interleaved": Interleaved, "flat": Flat, "separate": Separate}


def _per_head(x: Array, heads: int) -> Array:
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def flat(x: Array) -> Array:
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
