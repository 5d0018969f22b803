"""Saved engines and runs by someone who wishes ill: an error each, at once."""

import copy
import json

import jax.numpy as jnp
import numpy as np
import pytest
import untrusted
from engines import NEW, PROMPTS, finish, make, make_engine
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from untrusted import VALUES, bounded, read_header, refused, write_header

from gdn_jax import Engine, _trees
from gdn_jax.training import run
from gdn_jax.training.train import TrainState

pytestmark = pytest.mark.once  # what good files hold is restored on every line of JAX
unchecked = untrusted.unchecked


@pytest.fixture(scope="module")
def contents(tmp_path_factory, exact_products):
    """Arrays and notes of an engine with drafts that replays: two texts grow, a prompt
    is read in part, and another waits."""
    path = tmp_path_factory.mktemp("engine") / "engine"
    engine = make_engine(num_rows=3, speculative=2, decode="replay")
    for numbers in ((0, 4), (3, 1)):
        for i in numbers:
            engine.submit(PROMPTS[i], max_tokens=NEW, stop=(49,))
        engine.step()
        engine.step()
    found = [(x.row, x.prefilled, bool(x.tokens)) for x in engine.requests]
    assert found == [(0, 3, True), (1, 7, True), (2, 16, False), (None, 0, False)]
    engine.save(path)
    with safe_open(path, "np") as file:
        return load_file(path), json.loads(file.metadata()[_trees.NOTES])


@pytest.fixture
def write(contents, tmp_path):
    """An engine whose arrays and notes were changed."""

    def write(change):
        arrays, notes = dict(contents[0]), copy.deepcopy(contents[1])
        changed = change(arrays, notes["engine"])
        text = changed if isinstance(changed, str) else json.dumps(notes)
        save_file(arrays, tmp_path / "engine", {_trees.NOTES: text})
        return tmp_path / "engine"

    return write


def put(*path, value):
    """Into the notes."""

    def change(arrays, notes):
        *above, name = path
        for step in above:
            notes = notes[step]
        notes[name] = value

    return change


def fill(name, value):
    """An array."""

    def change(arrays, notes):
        arrays[name] = np.full_like(arrays[name], value)

    return change


def size(name, value):
    return put("sizes", name, value=value)


def asked(name, value, number=0):
    return put("requests", number, name, value=value)


def swap_rows(arrays, notes):
    one, other, *_ = notes["requests"]
    one["row"], other["row"] = other["row"], one["row"]


def stop_later(arrays, notes):
    arrays["rows/limit"] = arrays["rows/limit"] + 1


def lose_tokens(arrays, notes):
    del arrays["token"]


REPLAY = "model/layers/0/recurrent/"
LIES = {
    "no JSON": (lambda arrays, notes: "{", "has broken notes"),
    "a list": (lambda arrays, notes: "[]", "has broken notes (it holds a list)"),
    "nested": (lambda arrays, notes: "[" * 10**5, "has broken notes"),
    "no engine": (lambda arrays, notes: "{}", "holds no engine"),
    "an engine of text": (lambda arrays, notes: '{"engine": "x"}', "notes must be"),
    "a model of text": (put("model", value="x"), "another model: model is 'x'"),
    "models of any length": (put("model", value={"a" * 10**5: 1}), "aaa...aaa"),
    "no sizes": (put("sizes", value={}), "sizes must be an object of decode, max"),
    "rows without end": (size("num_rows", 2**31 - 1), "of the file's"),
    "10^12 rows": (size("num_rows", 10**12), "num_rows must be an int in [0, 2147"),
    "no rows": (size("num_rows", 0), "num_rows must be an int >= 1; got 0"),
    "rows of text": (size("num_rows", "3"), "num_rows must be an int in"),
    "half a row": (size("num_rows", 1.5), "num_rows must be an int in"),
    "a row more": (size("num_rows", 4), "sizes must be of the file's"),
    "a row less": (size("num_rows", 2), "row must be an int in [0, 2); got 2"),
    "positions": (size("num_positions", 10**6), "of the file's"),
    "stops": (size("max_stop", 10**9), "of the file's"),
    "drafts": (size("speculative", 10**9), "speculative must be in [0, 8]"),
    "a draft less": (size("speculative", 1), "of another model or of other sizes: "),
    "steps": (size("steps_per_call", 10**400), "steps_per_call must be an int in"),
    "pieces": (size("prefill_tokens", -5), "prefill_tokens must be an int in"),
    "a dtype": (size("recurrent_dtype", "O"), "recurrent_dtype must be one of"),
    "another dtype": (size("recurrent_dtype", "bfloat16"), "of another model or of"),
    "another scheme": (size("decode", "checkpoints"), "of another model or of other"),
    "an unknown scheme": (size("decode", "x"), "decode must be None or one of"),
    "a scheme of text": (size("decode", ["replay"]), "decode must be None or one of"),
    "figures of text": (put("figures", "steps", value="9"), "steps must be an int"),
    "requests of text": (put("requests", value="x"), "requests must be a list"),
    "a request of text": (put("requests", 0, value="x"), "request must be an object"),
    "an unknown field": (asked("x", 1), "request must be an object of finish_reason"),
    "more than submitted": (put("submitted", value=2), "number must be an int in [0, "),
    "a number twice": (asked("number", 1), "number must be another one for each"),
    "a prompt of text": (asked("prompt", "x"), "prompt must be a list of token ids"),
    "other tokens": (asked("prompt", [10**9]), "prompt must be token ids in [0, 50)"),
    "large tokens": (asked("tokens", [10**30]), "tokens must be a list of token ids"),
    "tokens without end": (asked("max_tokens", 10**9), "prompt must be at most"),
    "a large temperature": (asked("temperature", 10**400), "temperature must be a num"),
    "probabilities": (asked("log_probabilities", []), "log_probabilities must be a"),
    "stops more": (asked("stop", [1, 2, 3, 4, 5]), "stop must be at most max_stop"),
    "a row twice": (asked("row", 1), "row must be another one for each request"),
    "a row of text": (asked("row", "0"), "row must be an int in [0, 3)"),
    "a row outside": (asked("row", 3), "row must be an int in [0, 3)"),
    "read past the end": (asked("prefilled", 4), "prefilled must be an int in [0, 4)"),
    "unread": (asked("prefilled", 0), "request 0 has a text before its prompt is"),
    "read without a row": (asked("row", None), "request 0 has read of its prompt"),
    "finished": (asked("finish_reason", "stop"), "request 0 is finished"),
    "full": (asked("max_tokens", 3), "tokens and goes on"),
    "read further": (asked("prefilled", 17, 2), "row 2 is not of request 2"),
    "another seed": (asked("seed", 5), "row 0 is not of request 0"),
    "another end": (asked("stop", [48]), "row 0 is not of request 0"),
    "rows swapped": (swap_rows, "row 1 is not of request 0; row 0 is not of"),
    "a text that waits": (asked("prefilled", 16, 3), "read of its prompt without a"),
    "a later end": (stop_later, "row 0 is not of request 0"),
    "nothing goes on": (fill("is_active", 0), "is_active is not of the requests"),
    "all go on": (fill("is_active", 1), "is_active is not of the requests"),
    "lengths": (fill("model/length", 10**9), "length is not in [0, 97)"),
    "negative lengths": (fill("model/length", -1), "length is not in [0, 97)"),
    "other lengths": (fill("model/length", 5), "row 0 is not of request 0"),
    "token ids": (fill("token", 50), "token is not in [0, 50)"),
    "drafted ids": (fill("drafts/tokens", -1), "drafts is not in [0, 50)"),
    "accepted": (fill("num_accepted", 4), "num_accepted is not in [1, 4)"),
    "a convolution": (fill("model/layers/0/conv/start", 6), "layer 0's conv is not"),
    "a ring": (fill(REPLAY + "start", 16), "layer 0's records is not in [0, 16)"),
    "records": (fill(REPLAY + "committed", 17), "layer 0's records is not in"),
    "pending": (fill(REPLAY + "pending", -(2**31)), "layer 0's records is not in"),
    "an array less": (lose_tokens, "token is missing"),
    "an array more": (
        lambda arrays, notes: arrays.update({"x" * 10**5: np.ones(1)}),
        "xxx is not expected",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_engines_that_lie(write, lie):
    change, told = LIES[lie]
    path = write(change)
    with refused(path, told):
        Engine.restore(path, *make())


def test_an_array_of_another_shape_is_not_read(write, monkeypatch):
    """Nor one of a dtype that NumPy has not."""
    path = write(lambda arrays, notes: None)
    header, data = read_header(path)
    bools = header["is_active"]
    write_header(path, header | dict(is_active=bools | dict(dtype="F8_E4M3")), data)
    with refused(path, "is_active is F8_E4M3[3], wanted bool[3]"):
        Engine.restore(path, *make())


@pytest.mark.parametrize("make_it", [untrusted.fifo, untrusted.folder])
def test_an_engine_that_is_no_file(tmp_path, make_it):
    make_it(tmp_path / "engine")
    with refused(tmp_path / "engine", "is no file"):
        Engine.restore(tmp_path / "engine", *make())


def test_a_block_of_any_size_is_no_more_than_the_memory():
    """What a text may grow to is not in a state without attention."""
    without = make(layer_types=("linear_attention",), num_mtp_layers=0)
    with bounded(), pytest.raises(MemoryError, match="num_positions = 2000000000"):
        Engine(
            *without, num_rows=10**4, num_positions=2 * 10**9, steps_per_call=2 * 10**9
        )


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_any_notes_are_restored_or_refused(data, contents, tmp_path_factory):
    """What is restored ends its texts."""
    arrays, notes = contents[0], copy.deepcopy(contents[1])
    path = tmp_path_factory.getbasetemp() / "any_engine"
    engine = notes["engine"]
    parts = [engine, engine["sizes"], engine["figures"], *engine["requests"]]
    for _ in range(data.draw(st.integers(1, 3))):
        part = data.draw(st.sampled_from(parts))
        part[data.draw(st.sampled_from([*part]))] = data.draw(VALUES)
    save_file(arrays, path, {_trees.NOTES: json.dumps(notes)})
    with bounded(seconds=120):  # other sizes are compiled anew
        try:
            finish(Engine.restore(path, *make()))
        except ValueError as error:
            assert str(path) in str(error) and len(str(error)) < 8000


CURVE = dict(recipe=dict(steps=9), points=[])


@pytest.mark.parametrize(
    ("step", "notes", "told"),
    [
        (-1, CURVE, "says -1 of 9 steps"),
        (-(2**31), CURVE, "of 9 steps"),
        (10, CURVE, "says 10 of 9 steps"),
        (3, dict(recipe=dict(steps=9)), "of its points None"),
        (3, CURVE | dict(points="x"), "of its points 'x'"),
        (3, dict(points=[]), "another recipe"),
        (3, CURVE | dict(recipe=[]), "another recipe"),
    ],
)
def test_a_run_that_lies(tmp_path, step, notes, told):
    state = TrainState(jnp.zeros(2), jnp.zeros(2), jnp.zeros(2), jnp.int32(0))
    _trees.save(tmp_path / run.STATE, state._replace(step=jnp.int32(step)), notes)
    with refused(tmp_path, told):
        run.resume(tmp_path, state, CURVE)


@pytest.mark.parametrize("fault", ["[]", "{", "[" * 10**5])
def test_a_run_with_broken_notes(tmp_path, fault):
    state = TrainState(jnp.zeros(2), jnp.zeros(2), jnp.zeros(2), jnp.int32(0))
    _trees.save(tmp_path / run.STATE, state, {})
    header, data = read_header(tmp_path / run.STATE)
    header["__metadata__"][_trees.NOTES] = fault
    write_header(tmp_path / run.STATE, header, data)
    with refused(tmp_path / run.STATE, "has broken notes"):
        run.resume(tmp_path, state, CURVE)
