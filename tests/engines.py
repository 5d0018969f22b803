"""Small models and engines for the tests of generation, of few shapes."""

import functools

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np

from gdn_jax import Engine, models

# Prompts are read in pieces of 16: one shape of prefill.
SIZES = dict(num_rows=4, num_positions=96, steps_per_call=5, prefill_tokens=16)

NEW = 30  # tokens of a text
MIXED = [  # options of each prompt
    dict(),
    dict(temperature=1.0),
    dict(temperature=1.5, top_k=9, seed=3),
    dict(temperature=0.7, top_p=0.8, seed=2**64 + 5),
    dict(temperature=1.0, top_p=0.9, top_k=20, seed=-1, stop=(3, 9)),
    dict(temperature=2.0, seed=1, max_tokens=11),
]


@functools.cache
def make(vocab_size=50, scale=6.0, dtype=jnp.float32, **fields):
    """A model with a layer of each kind, and its parameters: large ones, so that texts
    vary, and a multi-token prediction head that is often right."""
    config = models.Config(
        **dict(
            model_type="qwen3_5_text",
            vocab_size=vocab_size,
            hidden_size=24,
            layer_types=("linear_attention", "full_attention"),
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=6,
            intermediate_size=40,
            num_mtp_layers=1,
            partial_rotary_factor=0.5,
            eos_token_id=(48,),
        )
        | fields
    )
    model = models.Model(config, dtype, dtype)
    params = model.init(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))["params"]
    params = flax.linen.unbox(params)
    params = jax.tree.map(lambda x: x * scale if x.ndim > 1 else x, params)
    params["embed"]["embedding"] *= 5  # the last token says most of the next one
    if config.num_mtp_layers:
        params["mtp"]["fc"]["kernel"] = jnp.eye(48, 24, dtype=dtype)
    return model, params


def make_engine(**sizes):
    return Engine(*make(), **SIZES | sizes)


def prompts(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 50, n).tolist() for n in lengths]


PROMPTS = prompts(3, 20, 1, 50, 7, 16)


def finish(engine):
    for _ in engine.run():
        pass


def write(engine, prompts, options=None, **shared):
    """The finished requests: of each prompt with its options and the shared ones."""
    requests = [
        engine.submit(prompt, **shared | each)
        for prompt, each in zip(prompts, options or [{}] * len(prompts), strict=True)
    ]
    finish(engine)
    return requests


def tokens(requests):
    return [request.tokens for request in requests]


@functools.cache
def greedy(speculative):
    engine = make_engine(speculative=speculative)
    return write(engine, PROMPTS, max_tokens=NEW, stop=()), engine.figures


@functools.cache
def mixed(speculative):
    engine = make_engine(speculative=speculative)
    return write(engine, PROMPTS, MIXED, **dict(max_tokens=NEW, stop=()))
