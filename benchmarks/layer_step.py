"""A layer's step between its projections: python benchmarks/layer_step.py [--tune]

One launch (`fused_layer_step`) beside the ops it is made of, beside `fused_update`
alone, and beside vLLM's update with norm, which has no convolution. A program is some
steps one after another, as a model's layers are, on slots of their own. What is told of
a step is its `span`, from the first kernel's start to the last one's end, gaps
included, and what its kernels take, `busy`; of vLLM, which Python launches, `busy`.
"""

import dataclasses
import functools
import json
import pathlib
import statistics
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peers
import typer
import update
from common import RESULTS, console, header, need_gpu, passed, wait
from rich.progress import track
from rich.table import Table

import gdn_jax
from gdn_jax import ConvState, LayerStepConfig, testing, timing

STEPS = 8  # of a program: enough that XLA makes one CUDA graph of it
PROGRAMS = 12
COMPILERS = 16
W = 4
NOISE = 0.005  # of a span: what two runs of one program differ by
PEER_TOLERANCE = 2e-2  # its out is rounded between the rule and the norm
INPUTS = update.INPUTS + "; normal z, convolution's inputs and weights"
TUNED = pathlib.Path(gdn_jax.__file__).parent / "ops/layer_step/tuned"
# block_v, lanes_v, num_warps
FEW_ROWS = [
    (64, 2, 16),
    (64, 2, 8),
    (32, 2, 8),
    (32, 2, 4),
    (128, 2, 16),
    (128, 4, 16),
]
MANY_ROWS = [
    (64, 2, 8),
    (32, 2, 8),
    (32, 2, 4),
    (32, 4, 4),
    (16, 2, 4),
    (16, 1, 8),
    (16, 2, 2),
]


@dataclasses.dataclass(frozen=True)
class Problem:
    """N rows of T tokens; with more than one they verify drafts."""

    N: int
    T: int
    H: int
    HV: int
    state_dtype: str
    K: int = 128
    V: int = 128

    @property
    def rule(self) -> update.Problem:
        sizes = self.N, self.T, self.H, self.HV, self.K, self.V
        return update.Problem(*sizes, state_dtype=self.state_dtype, dense=True)

    @property
    def split(self) -> tuple[int, int, int]:
        return self.H * self.K, self.H * self.K, self.HV * self.V


SIZES = ((16, 32), (4, 8))  # Qwen3.5-9B's heads, and a quarter of them
PROBLEMS = [
    Problem(N, T, *heads, dtype)
    for heads in SIZES
    for T in (1, 4)
    for dtype in ("float32", "bfloat16")
    for N in (1, 8, 64, 256)
]
TUNED_FOR = [
    Problem(N, T, *heads, dtype)
    for T in (1, 4)
    for dtype in ("float32", "bfloat16")
    for N, heads in ((1, SIZES[1]), (1, SIZES[0]), (8, SIZES[0]), (64, SIZES[0]))
]


class Inputs(NamedTuple):
    """`tokens` are of each step of a program, `tables` of each step of each program:
    the rule's slots, the convolution's, and how many tokens stand."""

    weights: dict[str, jax.Array]
    tokens: list[dict[str, jax.Array]]
    tables: list[list[dict[str, jax.Array]]]


def make_inputs(problem: Problem) -> Inputs:
    p, act = problem, jnp.bfloat16
    given = update.make_inputs(p.rule)
    keys = iter(jax.random.split(jax.random.key(2), 8 * STEPS))

    def normal(*shape):
        return jax.random.normal(next(keys), shape, jnp.float32).astype(act)

    C = sum(p.split)
    weights = {name: given[name] for name in ("A_log", "dt_bias")}
    weights |= dict(conv_weight=normal(C, W) / 2, norm_weight=1 + normal(p.V) / 8)
    lead = p.N, p.T
    shapes = dict(
        channels=(*lead, C),
        z=(*lead, p.HV * p.V),
        a=(*lead, p.HV),
        b=(*lead, p.HV),
        q=(*lead, p.H, p.K),
        k=(*lead, p.H, p.K),
        v=(*lead, p.HV, p.V),
    )
    tokens = [
        {name: normal(*shape) for name, shape in shapes.items()} for _ in range(STEPS)
    ]
    groups = len(given["slots"])
    own = np.random.default_rng(3).permutation(p.N * groups).astype(np.int32)
    each = [
        dict(slots=slots, conv_slots=jnp.asarray(conv))
        for slots, conv in zip(given["slots"], own.reshape(groups, p.N), strict=True)
    ]
    if p.T > 1:
        each = [one | dict(num_accepted=given["num_accepted"]) for one in each]
    programs = max(1, groups // STEPS)
    tables = [
        [each[(i * STEPS + j) % groups] for j in range(STEPS)] for i in range(programs)
    ]
    return Inputs(weights, tokens, tables)


def make_state(problem: Problem) -> tuple[ConvState, jax.Array]:
    p = problem
    state = update.make_inputs(p.rule)["state"]
    slots, ring = len(state) // p.T, W - 1 + p.T
    shape = slots, sum(p.split), ring
    buffer = jax.random.normal(jax.random.key(4), shape, jnp.float32)
    start = jnp.arange(slots, dtype=jnp.int32) % ring
    return ConvState(buffer.astype(jnp.bfloat16), start), state


def fused(state, weights, x, tables, **options):
    qkvz, ba = (x["channels"], x["z"]), (x["b"], x["a"])
    return gdn_jax.fused_layer_step(
        state, qkvz, ba, layout="flat", **weights, **tables, **options
    )


def chain(state, weights, x, tables, *, split, implementation):
    """As the layer has it, where no kernel takes all of it."""
    conv, pool = state
    of_rule = {key: table for key, table in tables.items() if key != "conv_slots"}
    of_conv = of_rule | dict(slots=tables["conv_slots"])
    conv, qkv = gdn_jax.causal_conv1d(
        conv,
        x["channels"],
        weights["conv_weight"],
        split=split,
        implementation=implementation,
        **of_conv,
    )
    q, k, v = (y.reshape(x[n].shape) for n, y in zip("qkv", qkv, strict=True))
    pool, out = bare(
        (conv, pool), weights, x | dict(q=q, k=k, v=v), tables, implementation
    )
    z = x["z"].reshape(out.shape)
    out = gdn_jax.gated_rms_norm(out, z, weights["norm_weight"])
    return (conv, pool[1]), out.reshape(x["z"].shape)


def bare(state, weights, x, tables, implementation="triton"):
    """The rule alone."""
    conv, pool = state
    of_rule = {key: table for key, table in tables.items() if key != "conv_slots"}
    heads = weights["A_log"], x["a"], x["b"], weights["dt_bias"]
    pool, out = gdn_jax.fused_update(
        pool, x["q"], x["k"], x["v"], *heads, implementation=implementation, **of_rule
    )
    return (conv, pool), out


def program_of(step: Callable[..., Any]) -> Any:
    def program(state, weights, tokens, tables):
        outs = []
        for x, table in zip(tokens, tables, strict=True):
            state, out = step(state, weights, x, table)
            outs.append(out)
        return state, outs

    return jax.jit(program, donate_argnums=0)


LAUNCHES = {"fused": 1, "chain": 3, "fused_update": 1}


def contenders(problem: Problem, config: LayerStepConfig | None) -> dict[str, Any]:
    options = dict(implementation="triton", config=config)
    in_turn = dict(split=problem.split, implementation="triton")
    return {
        "fused": functools.partial(fused, **options),
        "chain": functools.partial(chain, **in_turn),
        "fused_update": bare,
    }


def compile_program(problem: Problem, step: Callable[..., Any]) -> Any:
    """From shapes alone."""
    state = jax.eval_shape(lambda: make_state(problem))
    inputs = jax.eval_shape(lambda: make_inputs(problem))
    arguments = inputs.weights, inputs.tokens, inputs.tables[0]
    return program_of(step).lower(state, *arguments).compile()


def check(problem: Problem, inputs: Inputs, program: Any) -> dict[str, float]:
    """The largest difference from XLA's ops, after one program."""
    step = functools.partial(chain, split=problem.split, implementation="xla")
    arguments = inputs.weights, inputs.tokens, inputs.tables[0]
    got, outs = program(make_state(problem), *arguments)
    want, wanted = program_of(step)(make_state(problem), *arguments)
    dense = (conv.to_dense(W) for conv in (got[0], want[0]))  # wherever rings begin
    pairs = dict(state=(got[1], want[1]), conv=tuple(dense))
    errors = {name: relative_error(*pair) for name, pair in pairs.items()}
    errors["out"] = max(map(relative_error, outs, wanted))
    return errors


def relative_error(got: jax.Array, want: jax.Array) -> float:
    return float(_relative_error(got, want))


@jax.jit
def _relative_error(got: jax.Array, want: jax.Array) -> jax.Array:
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return jnp.linalg.norm((got - want).ravel()) / jnp.linalg.norm(want.ravel())


def tolerance(what: str) -> float:
    """q, k, v and out are rounded on their way, here and there to a neighbour."""
    return 0.0 if what == "conv" else testing.TOLERANCE[what, "bfloat16"]


def time_program(
    problem: Problem, inputs: Inputs, program: Any, launches: int
) -> dict[str, Any]:
    state = make_state(problem)

    def run(i: int) -> None:
        nonlocal state
        tables = inputs.tables[i % len(inputs.tables)]
        state, _ = program(state, inputs.weights, inputs.tokens, tables)

    run(0)
    wait()
    with timing.record() as kernels:
        for i in range(PROGRAMS):
            run(i)
        wait()
    each = len(kernels) // PROGRAMS
    if len(kernels) != PROGRAMS * STEPS * launches:
        names = sorted({kernel.name for kernel in kernels})
        raise RuntimeError(f"{len(kernels)} kernels in {PROGRAMS} programs: {names}")
    spans, busy = [], []
    for i in range(0, len(kernels), each):
        mine = kernels[i : i + each]
        end = mine[-1].start_us + mine[-1].duration_us
        spans.append((end - mine[0].start_us) / STEPS)
        busy.append(sum(kernel.duration_us for kernel in mine) / STEPS)
    return dict(
        span_us=statistics.median(spans),
        busy_us=statistics.median(busy),
        launches=each // STEPS,
    )


def measure(
    problem: Problem,
    inputs: Inputs,
    name: str,
    config: LayerStepConfig | None,
    compiled: Future,
) -> dict[str, Any]:
    row = {"contender": name, **dataclasses.asdict(problem)}
    row["config"] = config and dataclasses.asdict(config)
    program = compiled.result()
    if name != "fused_update":
        row["errors"] = check(problem, inputs, program)
        errors = row["errors"].items()
        if not all(error <= tolerance(what) for what, error in errors):
            return row | {"absent": "errors above the tolerance"}
    return row | time_program(problem, inputs, program, LAUNCHES[name])


def measure_peer(problem: Problem, inputs: Inputs) -> dict[str, Any]:
    """vLLM's, on channels that were convolved before."""
    row = {"contender": "vllm_post_conv", **dataclasses.asdict(problem)}
    x, tables = inputs.tokens[0], [table for some in inputs.tables for table in some]
    given = {name: x[name].reshape(-1, *x[name].shape[2:]) for name in x}
    given |= inputs.weights | dict(
        state=make_state(problem)[1],
        slots=[table["slots"] for table in tables],
        num_accepted=tables[0].get("num_accepted"),
    )
    try:
        call = peers.vllm_post_conv(problem.rule, given)
        call.run(0)
        _, out = bare(
            (None, make_state(problem)[1]), inputs.weights, x, tables[0], "xla"
        )
        z = x["z"].reshape(out.shape)
        want = gdn_jax.gated_rms_norm(out, z, inputs.weights["norm_weight"])
        got = call.result()["out"].reshape(want.shape)
        row["errors"] = {"out": testing.relative_error(got, want)}
        if not passed(lambda what: PEER_TOLERANCE, row["errors"]):
            return row | {"absent": "errors above the tolerance"}
        found = timing.measure(
            call.run, STEPS * PROGRAMS, wait=wait, belongs=call.kernels
        )
        return row | dict(busy_us=found.median_us, launches=found.kernels)
    except peers.Unavailable as reason:
        return row | {"absent": str(reason)}
    except Exception as error:  # nothing that a peer does ends the run
        return row | {"absent": f"failed: {type(error).__name__}: {error}"[:400]}


def configs_of(problem: Problem) -> list[LayerStepConfig]:
    launches = FEW_ROWS if problem.N * problem.HV <= 256 else MANY_ROWS
    return [LayerStepConfig(*launch) for launch in launches]


def jobs_of(problem: Problem, tune: bool) -> list[tuple[str, LayerStepConfig | None]]:
    tuned = [("fused", config) for config in configs_of(problem)]
    return [
        *(tuned if tune else [("fused", None)]),
        ("chain", None),
        ("fused_update", None),
    ]


def tuned_row(problem: Problem, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest launch, beside the ops one after another."""
    timed = {
        name: sorted(
            (row for row in rows if row["contender"] == name and "span_us" in row),
            key=lambda row: row["span_us"],
        )
        for name in LAUNCHES
    }
    if not all(timed.values()):
        raise RuntimeError(f"not all of {list(timed)} could be timed: {rows}")
    best, in_turn = timed["fused"][0], timed["chain"][0]["span_us"]
    return dict(
        K=problem.K,
        V=problem.V,
        state_dtype=problem.state_dtype,
        group=problem.HV // problem.H,
        tokens=problem.T,
        programs=problem.N * problem.HV,
        config=best["config"],
        pays=best["span_us"] < in_turn * (1 - NOISE),
        reason=(
            f"{best['span_us']:.2f} us at N={problem.N} T={problem.T} HV={problem.HV} "
            f"of {len(timed['fused'])} launches; ops one after another {in_turn:.2f}, "
            f"fused_update alone {timed['fused_update'][0]['span_us']:.2f}"
        ),
    )


def main(
    tune: bool = False, quick: bool = False, out: pathlib.Path | None = None
) -> None:
    """tune: many launches, the best of which are written for the package. quick: the
    first heads alone."""
    need_gpu()
    result = header(INPUTS)
    result["time"] = f"a step of {STEPS} in a program, median of {PROGRAMS} programs"
    result |= {"copy_tb_per_s": timing.copy_bandwidth(), "rows": []}
    device = result["device"].lower().replace(" ", "_")
    folder = out or RESULTS / device
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("layer_step_tune.json" if tune else "layer_step.json")
    problems = TUNED_FOR if tune else PROBLEMS[: len(PROBLEMS) // (2 if quick else 1)]
    with ThreadPoolExecutor(COMPILERS) as pool:
        compiled = {
            (problem, job): pool.submit(
                compile_program, problem, contenders(problem, job[1])[job[0]]
            )
            for problem in problems
            for job in jobs_of(problem, tune)
        }
    tuned = []
    for problem in track(problems, description="layer step", console=console):
        inputs = make_inputs(problem)
        rows = [
            measure(problem, inputs, *job, compiled[problem, job])
            for job in jobs_of(problem, tune)
        ]
        if tune:
            tuned.append(tuned_row(problem, rows))
        else:
            rows.append(measure_peer(problem, inputs))
        console.print(table(problem, rows))
        result["rows"] += rows
        path.write_text(json.dumps(result, indent=1) + "\n")
    if tune:
        about = {key: result[key] for key in ("device", "date", "commit", "versions")}
        place = (out or TUNED) / f"{device}.json"
        place.parent.mkdir(exist_ok=True)
        place.write_text(json.dumps(about | {"rows": tuned}, indent=1) + "\n")
    console.print(f"wrote {path}")


def table(problem: Problem, rows: list[dict[str, Any]]) -> Table:
    shown = Table(
        *(
            "contender",
            "span us",
            "busy us",
            "launches",
            "errors",
            "launch or why absent",
        ),
        title=" ".join(f"{k}={v}" for k, v in dataclasses.asdict(problem).items()),
        title_justify="left",
    )
    for row in rows:
        times = (row.get(key) for key in ("span_us", "busy_us"))
        errors = " ".join(f"{error:.1e}" for error in row.get("errors", {}).values())
        shown.add_row(
            row["contender"],
            *("" if us is None else f"{us:.2f}" for us in times),
            str(row.get("launches", "")),
            errors,
            str(row.get("absent", row.get("config") or "")),
        )
    return shown


if __name__ == "__main__":
    typer.run(main)
