"""A model in bfloat16, whose layers then run all their kernels, against float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import unbox

from gdn_jax import _triton, models, testing

N, M, S, PROMPT = 3, 32, 3, 9
CONFIG = dict(
    vocab_size=96,
    hidden_size=64,
    layer_types=("linear_attention", "full_attention"),
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    partial_rotary_factor=0.5,
    num_mtp_layers=1,
)
EXPERTS = dict(
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
)
KINDS = {
    "qwen3_5_text": dict(intermediate_size=96),
    "qwen3_next": EXPERTS,
}
# of a logit that two layers of bfloat16 made, relative RMS
TOLERANCE = 2e-2


@functools.cache
def params_of(kind):
    """Rounded to bfloat16, so that both models have the same."""
    config = models.Config(model_type=kind, **CONFIG, **KINDS[kind])
    tokens = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(models.Model(config).init, jax.random.key(0), tokens)
    draw = np.random.default_rng(0).normal
    params = jax.tree.map(
        lambda x: jnp.asarray(draw(0, 0.15, x.shape), jnp.bfloat16), unbox(shapes)
    )
    return config, params


def decode(kind, dtype, implementation):
    """Logits of a step, of a speculative one and of drafts behind it; the second of
    three sequences rests."""
    config, params = params_of(kind)
    model = models.Model(config, dtype=dtype, implementation=implementation)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    tokens = jax.random.randint(jax.random.key(1), (N, PROMPT + 1 + S), 0, 96)
    takes_part = jnp.array([True, False, True])

    @functools.partial(jax.jit, static_argnames="method")
    def call(*given, method="__call__", **tables):
        with jax.default_matmul_precision("highest"):  # a GPU's own is TF32
            return model.apply(params, *given, method=method, **tables)

    state = model.init_state(N, M, drafts=S - 1)
    plainly = models.Model(config, dtype=dtype, implementation="xla")
    _, state = jax.jit(plainly.apply)(params, tokens[:, :PROMPT], state)
    step, state = call(tokens[:, PROMPT : PROMPT + 1], state, takes_part=takes_part)
    hidden, _ = call(
        tokens[:, PROMPT + 1 :],
        state,
        takes_part=takes_part,
        num_accepted=jnp.ones(N, jnp.int32),
        method="hidden",
    )
    drafted, _ = call(
        tokens[:, PROMPT + 1 :],
        hidden,
        model.init_draft_cache(N, M),
        start=jnp.zeros(N, jnp.int32),
        method="draft",
    )
    found = step, call(hidden, method="logits"), call(drafted, method="logits")
    return [np.asarray(x.astype(jnp.float32))[[0, 2]] for x in found]


@functools.cache
def exact(kind):
    return decode(kind, jnp.float32, "xla")


@pytest.mark.parametrize("kind", KINDS)
def test_no_layer_leaves_its_kernels_to_xla(kind, monkeypatch):
    config, params = params_of(kind)
    model = models.Model(config, dtype=jnp.bfloat16, implementation="interpret")
    launch, seen = _triton.launch, set()

    def record(kernel, *args, **keywords):
        seen.add(getattr(kernel, "func", kernel).__name__.removesuffix("_kernel"))
        return launch(kernel, *args, **keywords)

    monkeypatch.setattr(_triton, "launch", record)
    # What was traced is not launched again: so of no other call's size, which costs
    # the tests after this one less than to clear all that was compiled.
    rows = 5 + list(KINDS).index(kind)
    state = model.init_state(rows, M)
    jax.eval_shape(model.apply, params, jnp.zeros((rows, 1), jnp.int32), state)
    wanted = {"few_rows", "add_norm", "conv", "fused_update", "attend"}
    if kind == "qwen3_next":
        wanted |= {"choose", "sort", "dot"}
    assert seen - {"combine"} == wanted


@pytest.mark.parametrize(
    "kind",
    [  # all but its MLP is in the other; test_few_rows.py has that on every line of JAX
        pytest.param("qwen3_5_text", marks=pytest.mark.once),
        "qwen3_next",
    ],
)
@pytest.mark.parametrize(
    "kernels", ["interpret", pytest.param("triton", marks=pytest.mark.gpu)]
)
def test_kernels_of_all_layers_agree(kernels, kind):
    found = decode(kind, jnp.bfloat16, kernels)
    for got, want in zip(found, exact(kind), strict=True):
        assert testing.relative_error(got, want) < TOLERANCE
