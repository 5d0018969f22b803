"""What a saved engine says of itself, read as any other data: it may be broken.

Its sizes are bounded by its file before anything is made of them, its requests are
asked anew, and what the device knows of them has to be what the host does: a text that
only one of the two takes to go on would never end.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gdn_jax.generation.prompts import asked_rows
from gdn_jax.generation.requests import Figures, Request, make_request
from gdn_jax.generation.sizes import Sizes, check_sizes
from gdn_jax.generation.state import EngineState, Row, state_bytes
from gdn_jax.models.config import Config
from gdn_jax.models.sharded import AnyModel
from gdn_jax.models.tokenizer import token_ids
from gdn_jax.nn.state import GatedDeltaNetState
from gdn_jax.ops import checks
from gdn_jax.ops.gated_delta.replay_state import ReplayState

REMEDY = "The file is broken: restore an older one."
ASKED = "prompt", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop"


def fields_of(kind: Any, value: Any) -> dict[str, Any]:
    """An object with the fields of a dataclass."""
    wanted = {field.name for field in dataclasses.fields(kind)}
    if not isinstance(value, dict) or value.keys() != wanted:
        name, wanted = kind.__name__.lower(), ", ".join(sorted(wanted))
        checks.fail(name, checks.shown(value), f"an object of {wanted}", REMEDY)
    return value


def read_sizes(value: Any, model: AnyModel, file_bytes: int) -> Sizes:
    value = fields_of(Sizes, value)
    for name, size in value.items():
        if name not in ("recurrent_dtype", "decode"):
            _check_int(name, size, 2**31)  # JAX counts in int32
    if value["recurrent_dtype"] not in checks.FLOATS:
        got, wanted = checks.shown(value["recurrent_dtype"]), ", ".join(checks.FLOATS)
        checks.fail("recurrent_dtype", got, f"one of {wanted}", REMEDY)
    sizes = check_sizes(model, **value)
    if (wanted := state_bytes(model, sizes)) > file_bytes:
        got = f"{sizes}, whose state has {wanted} bytes"
        checks.fail("sizes", got, f"of the file's {file_bytes} bytes", REMEDY)
    return sizes


def read_figures(value: Any) -> Figures:
    for name, count in fields_of(Figures, value).items():
        _check_int(name, count)
    return Figures(**value)


def read_requests(
    values: Any, submitted: Any, config: Config, sizes: Sizes
) -> list[Request]:
    _check_int("submitted", submitted)
    if not isinstance(values, list):
        checks.fail("requests", checks.shown(values), "a list", REMEDY)
    requests = [_read_request(value, config, sizes) for value in values]
    for request in requests:
        _check_int("number", request.number, submitted)
    rows = [request.row for request in requests if request.row is not None]
    numbers = [request.number for request in requests]
    for name, found in dict(row=rows, number=numbers).items():
        if len(set(found)) < len(found):
            wanted = "another one for each request"
            checks.fail(name, checks.shown(sorted(found)), wanted, REMEDY)
    return requests


def _read_request(value: Any, config: Config, sizes: Sizes) -> Request:
    value = fields_of(Request, value)
    _check_int("number", value["number"])
    asked = {name: value[name] for name in ASKED}
    request = make_request(value["number"], **asked, config=config, sizes=sizes)
    request.tokens = list(token_ids("tokens", value["tokens"], config.vocab_size))
    request.log_probabilities = found = value["log_probabilities"]
    is_list = isinstance(found, list) and len(found) == len(request.tokens)
    if not is_list or any(type(x) is not float for x in found):
        got = checks.shown(found)
        checks.fail("log_probabilities", got, "a number for each of tokens", REMEDY)
    if value["row"] is not None:
        _check_int("row", value["row"], sizes.num_rows)
    _check_int("prefilled", value["prefilled"], len(request.prompt) + 1)
    request.row, request.prefilled = value["row"], value["prefilled"]
    request.finish_reason = value["finish_reason"]
    _check_turn(request)
    return request


def _check_turn(request: Request) -> None:
    """It waits, or reads its prompt, or its text goes on."""
    count, fault = len(request.tokens), None
    if request.finish_reason is not None:
        fault = "is finished"
    elif request.row is None and request.prefilled:
        fault = "has read of its prompt without a row"
    elif request.unread and count:
        fault = "has a text before its prompt is read"
    elif not request.unread and not 0 < count < request.max_tokens:
        fault = f"has {count} tokens and goes on"
    elif count and request.tokens[-1] in request.stop:
        fault = "has come to an end and goes on"
    if fault is not None:
        raise ValueError(f"request {request.number} {fault}. {REMEDY}")


def faults_of_state(
    state: EngineState, sizes: Sizes, requests: list[Request], vocab_size: int
) -> list[str]:
    """Where it is not one of these requests, or holds what its kernels count by out of
    its range."""
    faults = [
        f"{name} is not in [{first}, {end})"
        for name, x, first, end in _ranges(state, sizes, vocab_size)
        if not ((_whole(x) >= first) & (_whole(x) < end)).all()
    ]
    known = [
        _whole(x)
        for x in (state.model.length, state.position, state.num_accepted, state.token)
    ]
    rows = _leaves(state.rows)
    growing = {request.row for request in requests if request.tokens}
    if set(np.flatnonzero(_whole(state.is_active)).tolist()) != growing:
        faults.append("is_active is not of the requests whose texts go on")
    for request in requests:
        if not request.prefilled:
            continue
        length, position, accepted, token = (int(x[request.row]) for x in known)
        is_so = length == request.prefilled
        if request.tokens:
            count = len(request.prompt) + len(request.tokens)
            is_so = position == count and length + accepted == count
            is_so = is_so and token == request.tokens[-1]
        asked = _leaves(asked_rows([request], sizes.max_stop))
        for wanted, got in zip(asked, rows, strict=True):
            is_so = is_so and np.array_equal(wanted[0], got[request.row])
        if not is_so:
            faults.append(f"row {request.row} is not of request {request.number}")
    return faults


def _leaves(rows: Row) -> list[np.ndarray]:
    rows = rows._replace(seed=jax.random.key_data(rows.seed))
    return [_whole(x) for x in jax.tree.leaves(rows)]


def _whole(x: Any) -> np.ndarray:
    """Also what lies on other processes' devices, which all have to ask for it."""
    lies = getattr(x, "sharding", None)
    if isinstance(lies, NamedSharding) and not lies.is_fully_addressable:
        where = NamedSharding(lies.mesh, PartitionSpec())
        x = jax.jit(lambda x: x, out_shardings=where)(x)
    return np.asarray(x)


def _ranges(state: EngineState, sizes: Sizes, vocab_size: int) -> list[tuple]:
    """(name, array, least, end)"""
    ranges: list[tuple] = [
        ("length", state.model.length, 0, sizes.num_positions + 1),
        ("position", state.position, 0, sizes.num_positions + 1),
        ("num_accepted", state.num_accepted, 1, sizes.speculative + 2),
        ("token", state.token, 0, vocab_size),
    ]
    if state.drafts is not None:
        ranges.append(("drafts", state.drafts.tokens, 0, vocab_size))
    for i, layer in enumerate(state.model.layers):
        if not isinstance(layer, GatedDeltaNetState):
            continue
        conv, recurrent = layer
        ranges.append((f"layer {i}'s conv", conv.start, 0, conv.buffer.shape[-1]))
        if isinstance(recurrent, ReplayState):
            window = recurrent.window
            ranges += [
                (f"layer {i}'s records", recurrent.start, 0, window),
                (f"layer {i}'s records", recurrent.committed, 0, window + 1),
                (f"layer {i}'s records", recurrent.pending, 0, window + 1),
            ]
    return ranges


def _check_int(name: str, x: Any, end: int | None = None) -> None:
    if type(x) is not int or x < 0 or (end is not None and x >= end):
        wanted = "an int >= 0" if end is None else f"an int in [0, {end})"
        checks.fail(name, checks.shown(x), wanted, REMEDY)
