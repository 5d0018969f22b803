"""Schedules of `replay_update` and steps of `fused_layer_step` for fuzz.py."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from fuzz_calls import Found, Wrong

import gdn_jax
from gdn_jax import ConvState, LayerStepConfig, testing
from gdn_jax.ops.gated_delta.tuning import check_registers
from gdn_jax.ops.layer_step import tuning
from gdn_jax.testing import draws
from gdn_jax.testing.replays import Host, Schedule

STATE_SIZE = 2**15  # values of one state at most
KERNELS = ("triton", "interpret")
# times what one value may be off by its own rounding: what comes before it is rounded
MOST = 10
MOST_TILES = 8  # of a program, which is compiled for each of them


def _bits(x: Any, places: np.ndarray) -> bytes:
    return np.asarray(x)[places].tobytes()


def _judge(found: Found, what: str, got, want, dtype: str, rule: str) -> None:
    """`rule`: the row of the tolerance table."""
    deviation = testing.deviation(got, want, dtype)
    found[what] = deviation
    bar = testing.TOLERANCE[rule, dtype]
    many = deviation.carried >= testing.MANY
    if not deviation.worst <= MOST or (many and deviation.rms > bar):
        raise Wrong(f"{what} deviates: {deviation}, allowed {bar} and {MOST}")


class Replays:
    """A case is a schedule: calls of rows that come, go, draft and lose drafts."""

    op, known = "replay_update", ("oracle",)
    inputs = (
        "normal q, k, v, b, a of size 1 or 8, state 0.1; A from 1 to 16; NaN in what "
        "no record is"
    )
    tolerance = (
        "relative RMS error below gdn_jax.testing.TOLERANCE against float64, that of "
        "chunks for the kernels, of the state behind every call and all calls' out; of "
        f"every value {MOST} halves of its last place and of {testing.FLOOR} of the "
        "values' size"
    )

    def __init__(self, against: str, implementation: str):
        self.against, self.implementation = against, implementation

    def shapes(self, seed: int, number: int) -> Schedule:
        random = np.random.default_rng([seed, number])

        def one_of(*values):
            return values[random.integers(len(values))]

        K, V, H = one_of(16, 20, 64, 96, 128), one_of(8, 32, 64, 128), one_of(1, 2, 4)
        while H * K * V > STATE_SIZE:
            H, V = ((H + 1) // 2, V) if H > 1 else (H, V // 2)
        groups = [group for group in (1, 2, 3, 4) if group * H * K * V <= STATE_SIZE]
        longest, rows = one_of(1, 2, 4, 5, 8, 16), one_of(1, 3, 4, 7)
        return Schedule(
            f"set {number}",
            calls=8 if longest > 2 else 24,
            window=one_of(16, 32),
            longest=longest,
            rows=rows,
            slots=rows + one_of(1, 3),
            tokens=max(longest, rows * longest * 2 // 3),
            H=H,
            HV=H * one_of(*groups),
            K=K,
            V=V,
            act_dtype=one_of("bfloat16", "bfloat16", "float32", "float16"),
            gate_spread=one_of(1.0, 8.0),
        )

    def compile(self, schedule: Schedule, seed: int) -> Callable:
        step = functools.partial(
            gdn_jax.replay_update, implementation=self.implementation
        )
        host = Host(schedule, [seed, 0])
        call = host.draw()
        lowered = jax.jit(step, donate_argnums=0).lower(
            host.replay_state(), *call.args, **call.kwargs
        )
        return lowered.compile()

    def draw(self, schedule: Schedule, seed: int, case: int) -> Host:
        """Its calls follow from what stands, one after another."""
        return Host(schedule, [seed, case])

    def check(self, update: Callable, schedule: Schedule, host: Host) -> Found:
        rule = "chunked " if self.implementation in KERNELS else ""
        state, outs, found = host.replay_state(), [], {}
        for _ in range(schedule.calls):
            call = host.draw()
            before = jax.tree.map(np.asarray, state)
            state, out = update(state, *call.args, **call.kwargs)
            want, out = host.take(call), np.asarray(out)
            outs.append((out.astype(np.float64), want))
            if np.any(out[want == 0]):
                raise Wrong("out of tokens of no live row is not zero")
            if not np.array_equal(state.pending, host.pending):
                raise Wrong(f"pending is {state.pending}, wanted {host.pending}")
            named = call.kwargs["slots"]
            others = np.setdiff1d(np.arange(schedule.slots), named)
            for x, y in zip(before, state, strict=True):
                if _bits(x, others) != _bits(y, others):
                    raise Wrong("a slot that no row names has other bits than before")
            got = np.asarray(state.to_dense()).astype(np.float64)
            _judge(found, "state", got, host.latest, "float32", f"{rule}state")
        got, want = map(np.stack, zip(*outs, strict=True))
        _judge(found, "out", got, want, schedule.act_dtype, f"{rule}out")
        return found

    def words(self, host: Host) -> dict[str, Any]:
        return {"pending": host.pending}


class Step(NamedTuple):
    """A call of `fused_layer_step`."""

    state: Any
    tokens: tuple[Any, Any]
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class StepShapes:
    """`of`: those of a `fused_update`, whose tables a step has as well. `config`: the
    kernel's launch, None where the call has none."""

    of: draws.Shapes
    layout: str
    width: int
    config: LayerStepConfig | None


def draw_config(random: np.random.Generator, K: int, V: int) -> LayerStepConfig:
    """A launch that the kernel takes; in half of them programs share out a head, some
    of which may lie past its end."""
    while True:
        warps, lanes_v, each = (2 ** int(n) for n in random.integers(0, (5, 4, 4)))
        programs = (1, 1, 1, 2, 4, 8)[random.integers(6)]
        config = LayerStepConfig(warps * lanes_v * each, lanes_v, warps, programs)
        try:
            check_registers(config, K, min(2, config.tiles(V)))
        except ValueError:
            continue
        if config.block_v <= 2 * V and config.tiles(V) <= MOST_TILES:
            return config


class LayerSteps:
    """One step in one launch, and as the ops it is made of."""

    op, known = "fused_layer_step", ("reference",)
    inputs = "normal; state 0.1 or more; NaN in tokens of null rows"
    tolerance = (
        "relative RMS error below gdn_jax.testing.TOLERANCE against the same op's "
        "reference, of the state that of the tokens' dtype, to which q, k and v are "
        f"rounded on their way; of every value {MOST} halves of its last place and of "
        f"{testing.FLOOR} of the values' size; the convolution's inputs by their bits"
    )

    def __init__(self, against: str, implementation: str):
        self.against, self.implementation = against, implementation

    def shapes(self, seed: int, number: int) -> StepShapes:
        """The first of those drawn that a layer's step takes."""
        random = np.random.default_rng([seed, number, 2])
        modes = [("packed", "checkpoints"), ("single", "paged")]
        modes += [("dense", "checkpoints")]
        for attempt in range(1000):
            x = draws.draw_shapes(seed, 1000 * number + attempt)
            fits = (x.tokens, x.slots) == modes[number % 3] and not x.kda
            if fits and not x.per_token_states and x.S <= tuning.MAX_TOKENS:
                break
        else:
            raise RuntimeError("no shapes of a layer's step were drawn")
        keep = ("null_slot", "qk_l2norm", "scale")
        options = tuple((key, value) for key, value in x.options if key in keep)
        layout = ("flat", "interleaved")[random.integers(2)]
        x = dataclasses.replace(x, options=options)
        width = (2, 4)[random.integers(2)]
        config = draw_config(random, x.K, x.V) if random.integers(4) else None
        return StepShapes(x, layout, width, config)

    def draw(self, shapes: StepShapes, seed: int, case: int) -> Step:
        x, random = shapes.of, np.random.default_rng([seed, case, 3])
        # per-token states are no option of a step; they are left out above
        full = (*x.options, ("per_token_states", False))
        drawn = draws.draw(dataclasses.replace(x, options=full), seed, case)
        act, C = jnp.dtype(x.act_dtype), 2 * x.H * x.K + x.HV * x.V

        def normal(*shape, dtype=act):
            return random.standard_normal(shape, np.float32).astype(dtype)

        ring = shapes.width - 1 + x.S
        start = random.integers(0, ring, x.P).astype(np.int32)
        conv = ConvState(normal(x.P, C, ring), start)  # pyright: ignore[reportArgumentType]
        tokens = normal(x.L, C + x.HV * x.V), normal(x.L, 2 * x.HV)
        for each in tokens:
            each[~drawn.live] = np.nan
        if x.tokens == "dense":
            tokens = tuple(y.reshape(x.N, x.longest, -1) for y in tokens)
        state, *_, A_log, _, _, dt_bias = drawn.args
        weights = dict(
            conv_weight=normal(C, shapes.width) / np.float32(2).astype(act),
            A_log=A_log,
            dt_bias=dt_bias,
            norm_weight=normal(x.V),
        )
        return Step((conv, state), tokens, weights | drawn.tables)

    def compile(self, shapes: StepShapes, seed: int) -> Callable:
        drawn = self.draw(shapes, seed, 0)

        def compiled(implementation: str, **options: Any) -> Callable:
            config = shapes.config if implementation in KERNELS else None

            def step(state, tokens, tables):
                return gdn_jax.fused_layer_step(
                    state,
                    *tokens,
                    layout=shapes.layout,
                    implementation=implementation,
                    config=config,
                    **tables,
                    **dict(shapes.of.options),
                )

            return jax.jit(step, **options).lower(*drawn).compile()

        # a GPU's own products of float32 are of fewer bits, the reference's too
        with jax.default_matmul_precision("highest"):
            ours = compiled(self.implementation, donate_argnums=0)
            reference = compiled("reference")
        return lambda *args: (reference(*args), ours(*args))

    def check(self, update: Callable, shapes: StepShapes, drawn: Step) -> Found:
        x, found = shapes.of, {}
        (want, want_out), (got, out) = jax.tree.map(
            np.asarray, update(*jax.device_put(drawn))
        )
        for a, b in zip(want[0], got[0], strict=True):
            if a.tobytes() != b.tobytes():
                raise Wrong("the convolution's state has other bits")
        pairs = zip(want[1], drawn.state[1], strict=True)
        changed = np.array([a.tobytes() != b.tobytes() for a, b in pairs])
        if _bits(got[1], ~changed) != _bits(drawn.state[1], ~changed):
            raise Wrong("a slot that no row writes has other bits than before")
        act = x.act_dtype
        coarser = max(
            x.state_dtype, act, key=lambda name: testing.TOLERANCE["out", name]
        )
        if changed.any():
            pair = (y[1][changed].astype(np.float64) for y in (got, want))
            _judge(found, "state", *pair, coarser, "state")
        zero = want_out.reshape(x.L, -1)
        dead = ~zero.astype(bool).any(axis=1)
        if np.any(out.reshape(x.L, -1)[dead]):
            raise Wrong("out of tokens of no live row is not zero")
        if not dead.all():
            pair = (y.astype(np.float64) for y in (out, want_out))
            _judge(found, "out", *pair, act, "out")
        return found

    def words(self, drawn: Step) -> dict[str, Any]:
        names = ("slots", "cu_seqlens", "num_accepted", "has_state")
        return {name: drawn.options.get(name) for name in names}
