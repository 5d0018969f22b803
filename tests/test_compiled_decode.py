"""What a block of decoding steps compiles to for an H200, without a GPU.

Of three layers as wide as those of Qwen3.5-9B inside, since narrow products are shared
out in parts, with a small hidden size and vocabulary.
"""

import functools
import re

import aot
import jax
import jax.numpy as jnp
import pytest
from flax.linen import meta

from gdn_jax import models
from gdn_jax.generation import steps
from gdn_jax.generation.sizes import Sizes
from gdn_jax.generation.state import init_state

P, M = 8, 256
MODEL = models.Model(
    models.Config(
        model_type="qwen3_5_text",
        vocab_size=1024,
        hidden_size=512,
        layer_types=("linear_attention",) * 2 + ("full_attention",),
        num_attention_heads=16,
        num_key_value_heads=4,
        intermediate_size=1024,
        num_mtp_layers=1,
    ),
    dtype=jnp.bfloat16,
    param_dtype=jnp.bfloat16,
)
# Between two norms of a Gated DeltaNet: projections, convolution, update, gated norm,
# projection. Of attention: projections, rope and norms of q and k (four), two cache
# writes, attention in parts and their sum, gate, projection. Then norm, gate and up,
# down, norm. The first also makes tables of slots. At most: some versions of XLA make
# one of two of attention's.
LAUNCHES = {"layers_0": 10, "layers_1": 9, "layers_2": 15}


@functools.cache
def compiled(drafts: int, decode: str | None = None) -> aot.Compiled:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = meta.unbox(jax.eval_shape(MODEL.init, jax.random.key(0), tokens))
    decode = decode or ("checkpoints" if drafts else "in_place")
    sizes = Sizes(P, M, drafts, 16, 2048, 1, "float32", decode)
    state = jax.eval_shape(lambda: init_state(MODEL, sizes))

    def block(params, state):
        return steps.decode.__wrapped__(MODEL, params, state, 16, greedy=True)

    return aot.compile_for_h200(block, params, state, donate_argnums=1)


def body(hlo: str) -> list[str]:
    """What starts work in a step, from the computation with most kernels: an
    instruction's result and the place in the model."""
    computations = re.split(r"\n\n", hlo)
    step = max(computations, key=lambda text: text.count(aot.KERNEL_CALL))
    free = r" (parameter|tuple|get-tuple-element|bitcast|constant)\("
    lines = (line.strip() for line in step.splitlines() if " = " in line)
    found = [line for line in lines if not re.search(free, line)]
    places = (re.search(r'op_name="([^"]*)"', line) for line in found)
    results = (
        re.match(r"(\(.*?\)|\S+) [\w-]+\(", line.split(" = ", 1)[1]) for line in found
    )
    return [
        f"{result[0] if result else line} {place[1] if place else ''}"
        for line, result, place in zip(found, results, places, strict=True)
    ]


@pytest.mark.parametrize(("drafts", "decode"), [(0, None), (3, None), (3, "replay")])
def test_states_and_caches_stay_where_they_are(drafts, decode):
    """No copy, and no other layout, of what a sequence has."""
    columns = 1 + drafts
    rule = [(P * columns, 32, 128, 128)]
    if decode == "replay":
        rule = [(P, 32, 128, 128), (P, 32, 16, 128), (P, 16, 16, 128)]
    pools = (
        *rule,  # states, or checkpoints and records
        (P, 8192, 3 + columns),  # the convolution's
        (P, 4, M, 256),  # keys, values
    )
    found = compiled(drafts, decode)
    hlo = found.hlo
    for shape in pools:
        text = ",".join(map(str, shape))
        assert f"[{text}]" in hlo
        assert not aot.copies(found, jax.ShapeDtypeStruct(shape, jnp.int8))
        moved = re.findall(rf"= \S*\[{text}\]\S* (?:transpose|fusion)\(.*", hlo)
        assert not [line for line in moved if "transpose" in line.split("(")[0]]


def test_weights_are_read_where_they_are():
    """No matrix is joined with another, transposed or written in parts."""
    for line in body(compiled(0).hlo):
        for made in re.findall(r"\w+\[([\d,]+)\]", line.split(" /")[0]):
            sizes = [int(size) for size in made.split(",")]
            assert not (len(sizes) == 2 and min(sizes) >= 512), line


@pytest.mark.parametrize("layer", LAUNCHES)
def test_launches_of_a_layer(layer):
    found = [line for line in body(compiled(0).hlo) if f"/{layer}/" in line]
    assert LAUNCHES[layer] - 3 <= len(found) <= LAUNCHES[layer], "\n".join(found)


def test_a_step_waits_for_its_host_once_in_four():
    """Of the loops that a block is, the inner one's steps are counted beforehand."""
    hlo = compiled(0).hlo
    assert '"known_trip_count":{"n":"4"}' in hlo
    assert " conditional(" not in hlo
