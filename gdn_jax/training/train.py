"""Training on windows of a text, resumable at every step.

A step is a function of the state and its own number: windows, and weights left out, are
drawn with keys folded from the recipe's seed. So a run that is killed and resumed ends
as it would have.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

from gdn_jax.models.model import Model
from gdn_jax.ops import checks
from gdn_jax.training.recipe import Recipe
from gdn_jax.training.text import SEPARATOR


class TrainState(NamedTuple):
    """What a step takes and gives.

    Attributes:
      params: the model's.
      average: their running average, which is what is kept in the end.
      optimizer: optax's state.
      step: int32, steps taken.
    """

    params: Any
    average: Any
    optimizer: Any
    step: Array


class Losses(NamedTuple):
    """Mean bits per byte.

    Attributes:
      next: of the next byte.
      drafts: [S], of the bytes that the multi-token prediction head drafts.
    """

    next: Array
    drafts: Array


def init(model: Model, recipe: Recipe) -> TrainState:
    params = nn.unbox(model.init(keys_of(recipe)[0], jnp.zeros((1, 1), jnp.int32)))[
        "params"
    ]
    params = jax.tree_util.tree_map_with_path(_rescale, params)
    state = make_optimizer(recipe).init(params)
    average = jax.tree.map(jnp.copy, params)  # of its own: both are donated
    return TrainState(params, average, state, jnp.int32(0))


def keys_of(recipe: Recipe) -> Array:
    """Of the parameters, and of the steps."""
    return jax.random.split(jax.random.key(recipe.seed))


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    rates = optax.warmup_cosine_decay_schedule(
        0.0,
        recipe.learning_rate,
        max(1, round(recipe.warmup * recipe.steps)),
        recipe.steps,
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            rates,
            b2=0.99,
            weight_decay=recipe.weight_decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        ),
    )


@functools.partial(
    jax.jit, static_argnames=("model", "recipe", "steps"), donate_argnames="state"
)
def train(
    model: Model, recipe: Recipe, state: TrainState, text: Array, steps: int
) -> tuple[TrainState, Losses]:
    """Takes `steps` steps on windows of `text` [B] uint8: the state, each's losses."""
    optimizer = make_optimizer(recipe)

    def step(state: TrainState, _: None) -> tuple[TrainState, Losses]:
        key = jax.random.fold_in(keys_of(recipe)[1], state.step)
        windows = draw_windows(key, text, recipe)

        def loss(params):
            losses = losses_of(model, params, windows, recipe, key)
            halves = recipe.draft_weight * 0.5 ** jnp.arange(recipe.drafts)
            return losses.next + jnp.sum(halves * losses.drafts), losses

        grads, losses = jax.grad(loss, has_aux=True)(state.params)
        updates, optimizer_state = optimizer.update(
            grads, state.optimizer, state.params
        )
        params = optax.apply_updates(state.params, updates)
        # The first steps' average is theirs alone, not the random beginning's.
        kept = jnp.minimum(recipe.averaging, state.step / (state.step + 10))
        average = jax.tree.map(
            lambda old, new: old + (1 - kept) * (new - old), state.average, params
        )
        return TrainState(params, average, optimizer_state, state.step + 1), losses

    return jax.lax.scan(step, state, None, length=steps)


def draw_windows(key: Array, text: Array, recipe: Recipe) -> Array:
    """[batch, length + 1 + drafts] int32, from anywhere in the text."""
    size = recipe.length + 1 + recipe.drafts
    begins = jax.random.randint(
        jax.random.fold_in(key, 0), (recipe.batch,), 0, text.shape[0] - size + 1
    )
    return text[begins[:, None] + jnp.arange(size)].astype(jnp.int32)


def losses_of(
    model: Model, params: Any, windows: Array, recipe: Recipe, key: Array
) -> Losses:
    """Of windows [N, length + 1 + drafts], in bits."""
    T = recipe.length
    params = drop_weights(params, recipe.weight_drop, key)
    variables = {"params": params}
    hidden, _ = model.apply(variables, windows[:, :T], method="hidden")

    def bits(hidden: Array, ahead: int) -> Array:
        logits: Any = model.apply(variables, hidden, method="logits")
        wanted = windows[:, ahead : ahead + T]
        nats = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), wanted
        )
        return jnp.mean(nats) / jnp.log(2.0)

    first = bits(hidden, 1)
    drafts = []
    for i in range(recipe.drafts):
        behind = windows[:, i + 1 : i + 1 + T]
        hidden, _ = model.apply(variables, behind, hidden, step=i, method="draft")
        drafts.append(bits(hidden, i + 2))
    return Losses(first, jnp.stack(drafts) if drafts else jnp.zeros(0))


def drop_weights(params: Any, share: float, key: Array) -> Any:
    """Kernels of projections with a share of their entries at zero, the rest larger for
    it."""
    if not share:
        return params
    named, structure = jax.tree_util.tree_flatten_with_path(params)

    def drop(number: int, path: Any, x: Array) -> Array:
        if path[-1].key != "kernel":
            return x
        kept = jax.random.bernoulli(
            jax.random.fold_in(key, 1 + number), 1 - share, x.shape
        )
        return jnp.where(kept, x / (1 - share), 0)

    dropped = [drop(i, path, x) for i, (path, x) in enumerate(named)]
    return jax.tree.unflatten(structure, dropped)


def bits_per_byte(
    model: Model, params: Any, text: bytes, *, stride: int = 1024, batch: int = 8
) -> float:
    """Bits per byte of a text that begins behind a separator.

    Windows of two strides overlap by one: a byte is predicted from `stride` bytes at
    least, but near the text's beginning, where from all before it.
    """
    if not text:
        checks.fail("text", "nothing", "one byte at least", "It is a mean over them.")
    separated = jnp.frombuffer(SEPARATOR + text, jnp.uint8).astype(jnp.int32)
    length = 2 * stride
    count = max(1, -(-(len(text) - stride) // stride))
    count = -(-count // batch) * batch
    padded = jnp.pad(separated, (0, (count + 1) * stride + 1 - separated.shape[0]))
    nats = 0.0
    for begin in range(0, count, batch):
        numbers = jnp.arange(begin, begin + batch)
        places = numbers[:, None] * stride + jnp.arange(length + 1)
        is_new = (places[:, 1:] >= (numbers[:, None] + 1) * stride + 1) | (
            numbers[:, None] == 0
        )
        is_new &= places[:, 1:] <= len(text)
        nats += float(_nats(model, params, padded[places], is_new))
    return nats / len(text) / float(jnp.log(2.0))


@functools.partial(jax.jit, static_argnames="model")
def _nats(model: Model, params: Any, windows: Array, counted: Array) -> Array:
    logits: Any = model.apply({"params": params}, windows[:, :-1])
    nats = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), windows[:, 1:]
    )
    return jnp.sum(jnp.where(counted, nats, 0))


def _rescale(path: Any, x: Array) -> Array:
    """Matrices by their inputs' number: a small model's begin too small at 0.02."""
    is_kernel = path[-1].key == "kernel"
    return x * (x.shape[0] ** -0.5 / 0.02) if is_kernel else x
