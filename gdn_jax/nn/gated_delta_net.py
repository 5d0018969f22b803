"""The Gated DeltaNet layer: projections, convolution, rule, gated norm, projection."""

from __future__ import annotations  # so that help() names types and expands none

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

import gdn_jax
from gdn_jax import _types as t
from gdn_jax._dispatch import where_it_can
from gdn_jax.nn import arguments, initializers
from gdn_jax.nn.initializers import Initializer
from gdn_jax.nn.projections import LAYOUTS, Heads, Matrices, flat
from gdn_jax.nn.state import GatedDeltaNetState, check_type, pools_of, zeros
from gdn_jax.ops import checks
from gdn_jax.ops.batch import Batch
from gdn_jax.ops.causal_conv1d.call import ConvState
from gdn_jax.ops.few_rows.call import total
from gdn_jax.ops.gated_delta.call import dtype_before_norm
from gdn_jax.ops.gated_delta.replay_prefill import chunk_replay
from gdn_jax.ops.gated_delta.replay_state import ReplayState
from gdn_jax.ops.tables import Tables, find_tables


class GatedDeltaNet(nn.Module):
    """The Gated DeltaNet layer, its state passed in and returned.

        channels, z, a, b = projections(x)
        q, k, v = silu(convolution(channels))
        out = gated delta rule(q, k, v, a, b)               (see `fused_update`)
        y = projection(RMS norm(out) * silu(z))

        >>> import jax, jax.numpy as jnp
        >>> from gdn_jax.nn import GatedDeltaNet
        >>> layer = GatedDeltaNet(64, 2, 4, 16, 16)         # D, H, HV, K, V
        >>> x = jax.random.normal(jax.random.key(0), (2, 6, 64))
        >>> params = layer.init(jax.random.key(1), x)
        >>> y, _ = layer.apply(params, x)                   # from zeros: training
        >>> first, state = layer.apply(params, x[:, :5])
        >>> last, state = layer.apply(params, x[:, 5:], state)       # goes on
        >>> bool(jnp.allclose(y[:, 5:], last, atol=1e-4))
        True

    Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (arXiv:2412.06464); KDA:
    "Kimi Linear" (arXiv:2510.26692). Models, as transformers 5.23 has them, differ from
    the defaults in:

        Qwen3-Next    layout="interleaved"
        Qwen3.5       none
        OLMo-hybrid   layout="separate", allow_neg_eigval=True, norm_eps=1e-5
        Kimi-Linear   layout="separate", per_key_decay=True, gate_rank=head dim,
                      norm_eps=1e-5, output_activation="sigmoid"

    Attributes:
      hidden_size: D, of x and y.
      num_key_heads: H.
      num_value_heads: HV; HV % H == 0.
      key_head_dim: K.
      value_head_dim: V.
      conv_width: W of the convolution.
      layout: which projections are one matrix. "flat": [q | k | v], and one each for z,
        b and a. "interleaved": [q | k | v | z] and [b | a], each key head's part after
        another's. "separate": one each.
      per_key_decay: a decay for each K instead of each head (KDA).
      gate_rank: if given, the projections of `a` and `z` are products of two through so
        many features. Not with "interleaved", nor is `per_key_decay`.
      allow_neg_eigval: as in `fused_update`.
      gate_lower_bound: as in `fused_update`.
      norm_eps: of the norm behind the rule.
      output_activation: of the output gate, "silu" or "sigmoid".
      dtype: of the projections, the convolution's state and y; the rule, the norm and
        the convolution compute in float32.
      param_dtype: of parameters but A_log and dt_bias, which are float32.
      kernel_init: of the projections.
      conv_init: of the convolution's weight [C, W].
      A_log_init: of A_log.
      dt_bias_init: of dt_bias, which transformers begins with ones in Qwen's models,
        with time steps in the others, as here.

    Parameters carry logical axis names (`nn.logical_to_mesh`): "embed" (D),
    "gdn_key_heads" and "gdn_value_heads" (axes whose outer part is heads, to be split
    between heads), "gdn_channels" (C). NNX creates them on a mesh, by the rules of
    `nn.logical_axis_rules`, unless told that there is none:

        >>> from flax import nnx
        >>> module = nnx.bridge.ToNNX(layer, rngs=nnx.Rngs(0))
        >>> with nnx.use_eager_sharding(False):
        ...     module = nnx.bridge.lazy_init(module, x)
        >>> y, state = module(x)
    """

    hidden_size: int
    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_width: int = 4
    layout: str = "flat"
    per_key_decay: bool = False
    gate_rank: int | None = None
    allow_neg_eigval: bool = False
    gate_lower_bound: float | None = None
    norm_eps: float = 1e-6
    output_activation: str = "silu"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.normal(0.02)
    conv_init: Initializer = initializers.uniform_fan_in()
    A_log_init: Initializer = initializers.decay_rate()
    dt_bias_init: Initializer = initializers.time_step()

    def __post_init__(self):
        arguments.check_fields(self)
        super().__post_init__()

    @property
    def heads(self) -> Heads:
        H, HV = self.num_key_heads, self.num_value_heads
        return Heads(H, HV, self.key_head_dim, self.value_head_dim)

    def setup(self):
        def param(name, init, shape, *axes, dtype=jnp.float32) -> Any:
            init = nn.with_logical_partitioning(init, axes)
            return self.param(name, init, shape, dtype)

        heads, dtype = self.heads, self.param_dtype
        matrices = Matrices(self.dtype, dtype, self.kernel_init)
        self.in_proj = LAYOUTS[self.layout](
            heads, matrices, self.per_key_decay, self.gate_rank
        )
        filters = (heads.channels, self.conv_width)
        self.conv_weight = param(
            "conv_weight", self.conv_init, filters, "gdn_channels", None, dtype=dtype
        )
        decays = (heads.HV, heads.K) if self.per_key_decay else (heads.HV,)
        axes = ("gdn_value_heads", None)[: len(decays)]
        self.A_log = param("A_log", self.A_log_init, decays[:1], *axes[:1])
        self.dt_bias = param("dt_bias", self.dt_bias_init, decays, *axes)
        ones = nn.initializers.ones
        self.norm_weight = param("norm_weight", ones, (heads.V,), None, dtype=dtype)
        self.out_proj = matrices.dense(self.hidden_size, "gdn_value_heads", "embed")

    def __call__(
        self,
        x: t.Hidden,
        state: GatedDeltaNetState | None = None,
        *,
        slots: ArrayLike | None = None,
        conv_slots: ArrayLike | None = None,
        cu_seqlens: ArrayLike | None = None,
        num_accepted: ArrayLike | None = None,
        has_state: ArrayLike | None = None,
        null_slot: int | None = None,
        path: str | None = None,
        implementation: str | None = None,
    ) -> tuple[t.Hidden, GatedDeltaNetState]:
        """Prefill, decoding, ragged batches and speculative verification: (y, state).

        Whether a row has a state and whether it is speculative is said by `has_state`
        and `num_accepted`, never by how many tokens it has. Rows that continue and rows
        that begin, of any lengths, may share a call.

        Args:
          x: [N, T, D] (dense) or [L, D] (packed). A sequence of T tokens is [1, T, D]:
            packed tokens without `cu_seqlens` are L sequences of one token each.
          state: from `init_state` or the last call. Donate it under `jax.jit` and it is
            updated in place. None: every row begins from zeros.
          slots: [N] int32, or [N, S] with `num_accepted`; as in `fused_update`. Of a
            replay state always [N].
          conv_slots: [N] int32, each row's slot of `state.conv`, which has one a
            sequence where the rule has S. None: `slots`, or its column 0, so that a
            sequence's first slot is its slot in both pools.
          cu_seqlens, num_accepted, has_state: as in `fused_update`. Also the step after
            the last speculative one needs `num_accepted`: without it one token of that
            step stands, of a replay state too. `num_accepted` is 1 to S, of a replay
            state 1 to the tokens of the last step, and 1 behind a prompt.
          null_slot: one that means "none" in `slots`.
          path: "fused" (token by token) or "chunk". None: fused with `num_accepted`, up
            to 16 dense tokens a row, and without `cu_seqlens` where tokens are packed.
            Of a replay state several tokens a row go in chunks without `num_accepted`,
            since they are not to stay pending.
            Per-K decays (KDA) in chunks are XLA's.
          implementation: of projections, convolution, rule and norm, as in
            `fused_update`; beside the kernels of others XLA's is the norm, which has
            none, and projections of more than 128 tokens or in float32.

        Null rule: as in `fused_update`, for both states; a row is null also where its
        convolution's slot is. Its y is exactly zero, and so is that of tokens of no
        row; NaN in their x reaches nothing, gradients included.

        Returns:
          y: of x's shape, in `dtype`.
          state: like the argument, moved on behind this call's tokens; if that was None
            [N, ...], float32 in its recurrent part.

        Raises:
          ValueError: the call is wrong; the text names the argument and the remedy.
          NotImplementedError: the implementation asked for cannot run this call here.
        """
        parts, state = self.parts(
            x,
            state,
            slots=slots,
            conv_slots=conv_slots,
            cu_seqlens=cu_seqlens,
            num_accepted=num_accepted,
            has_state=has_state,
            null_slot=null_slot,
            path=path,
            implementation=implementation,
        )
        return total(parts, self.dtype), state

    def parts(
        self,
        x: t.Hidden,
        state: GatedDeltaNetState | None = None,
        *,
        slots: ArrayLike | None = None,
        conv_slots: ArrayLike | None = None,
        cu_seqlens: ArrayLike | None = None,
        num_accepted: ArrayLike | None = None,
        has_state: ArrayLike | None = None,
        null_slot: int | None = None,
        path: str | None = None,
        implementation: str | None = None,
    ) -> tuple[Array, GatedDeltaNetState]:
        """As the call, but y in parts [S ..] whose sum it is, for what sums anyway."""
        arguments.check_tokens(x, self.hidden_size)
        given = checks.tables(slots, cu_seqlens, num_accepted, has_state)
        state = self._begin(x, given) if state is None else check_type(state)
        path = arguments.choose_path(path, x, given, replay=state.is_replay)
        pools = pools_of(
            state, self.heads.channels, self.conv_width, given, null_slot, path
        )
        tables = find_tables(given, conv_slots, x.shape[:-1], pools)
        if path == "fused" and arguments.steps_at_once(
            self, x, state, given, implementation
        ):
            of_call = given._asdict() | dict(conv_slots=conv_slots, null_slot=null_slot)
            return self._step(x, state, tables.live, implementation, of_call)

        channels, z, a, b = self.in_proj(x, tables.live, implementation)
        conv, qkv = self.convolve(state.conv, channels, tables, implementation)
        recurrent, out = self.update(
            state.recurrent, qkv, a, b, tables, path, implementation
        )
        y = flat(self.norm(out, z, implementation)).astype(self.dtype)
        parts = self.out_proj.parts(y, implementation)
        return parts, GatedDeltaNetState(conv, recurrent)

    def _step(
        self,
        x: Array,
        state: GatedDeltaNetState,
        live: Array | None,
        implementation: str | None,
        tables: dict[str, Any],
    ) -> tuple[Array, GatedDeltaNetState]:
        qkvz, ba = self.in_proj.whole(x, live, implementation)
        (conv, recurrent), y = gdn_jax.fused_layer_step(
            (state.conv, state.recurrent),
            qkvz,
            ba,
            layout=self.layout,
            conv_weight=self.conv_weight,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            norm_weight=self.norm_weight,
            eps=self.norm_eps,
            activation=self.output_activation,
            allow_neg_eigval=self.allow_neg_eigval,
            gate_lower_bound=self.gate_lower_bound,
            implementation=implementation,
            **tables,
        )
        parts = self.out_proj.parts(y, implementation)
        return parts, GatedDeltaNetState(conv, recurrent)

    def convolve(
        self,
        state: ConvState,
        channels: Array,
        tables: Tables,
        implementation: str | None,
    ) -> tuple[ConvState, tuple[Array, Array, Array]]:
        conv, qkv = gdn_jax.causal_conv1d(
            state,
            channels,
            self.conv_weight,
            split=self.heads.split,
            implementation=implementation,
            **tables.conv,
        )
        return conv, self.heads.apart(*qkv)

    def update(
        self,
        state: Array | ReplayState,
        qkv: tuple[Array, Array, Array],
        a: Array,
        b: Array,
        tables: Tables,
        path: str,
        implementation: str | None,
    ) -> tuple[Array | ReplayState, Array]:
        keywords = dict(tables.recurrent)
        rules: dict[str, Callable[..., Any]] = {
            "fused": gdn_jax.fused_update,
            "chunk": gdn_jax.chunk_update,
        }
        if isinstance(state, ReplayState):
            in_chunks = functools.partial(chunk_replay, rows=tables.rows)
            rules = {"fused": gdn_jax.replay_update, "chunk": in_chunks}
        if path == "chunk":
            del keywords["num_accepted"]
        tokens = *qkv, self.A_log, a, b, self.dt_bias
        return rules[path](
            state,
            *tokens,
            allow_neg_eigval=self.allow_neg_eigval,
            gate_lower_bound=self.gate_lower_bound,
            out_dtype=dtype_before_norm(qkv[2].dtype),
            implementation=implementation,
            **keywords,
        )

    def norm(self, out: Array, z: Array, implementation: str | None) -> Array:
        return gdn_jax.gated_rms_norm(
            out,
            z,
            self.norm_weight,
            eps=self.norm_eps,
            activation=self.output_activation,
            implementation=where_it_can(implementation, out, lambda: "it has none"),
        )

    @nn.nowrap
    def init_state(
        self,
        num_slots: int,
        *,
        columns: int = 1,
        num_conv_slots: int | None = None,
        recurrent_dtype: Any = jnp.float32,
        decode: str | None = None,
    ) -> GatedDeltaNetState:
        """An empty state, dense or a pool. Call it for each layer: two that share one
        cannot both be donated.

        Args:
          num_slots: N for a state per sequence; P for a pool, with `slots`.
          columns: S, 1 + drafts, for speculative decoding, where a sequence takes S of
            the P slots. It widens the convolution's ring alone.
          num_conv_slots: slots of the convolution's state, for calls with `conv_slots`,
            since a sequence needs one where the rule takes S; None: num_slots.
          recurrent_dtype: float32, bfloat16 or float16, of the rule's states.
          decode: "replay": the rule's states are a `ReplayState`, which needs one slot
            a sequence, whatever `columns` is, up to 32: its window is 16, or 32 where
            they are more than 16. "in_place" or "checkpoints": they are arrays, for
            decoding without drafts or with them; without, both mean the same. None:
            one of these two.

        Raises:
          ValueError: one of these is not what it must be.
        """
        if num_conv_slots is None:
            num_conv_slots = num_slots
        arguments.check_pools(num_slots, num_conv_slots, recurrent_dtype)
        arguments.check_decode(decode, columns)
        return self._zeros(
            num_slots,
            num_conv_slots,
            columns=columns,
            recurrent_dtype=recurrent_dtype,
            window=arguments.window_of(columns) if decode == "replay" else None,
            per_key_decay=self.per_key_decay,
        )

    @nn.nowrap
    def _zeros(self, *num_slots: int, **options: Any) -> GatedDeltaNetState:
        width, dtype = self.conv_width, self.dtype
        return zeros(self.heads, *num_slots, width=width, dtype=dtype, **options)

    @nn.nowrap
    def _begin(self, x: Array, given: Batch) -> GatedDeltaNetState:
        arguments.check_begins_from_zeros(given)
        num_rows, _, _ = checks.rows_of(x.shape[:-1], given.cu_seqlens)
        return self._zeros(num_rows, num_rows)  # also of no rows
