"""From requests to the arrays of a prefill call."""

from typing import Any

import jax
import numpy as np

from gdn_jax.generation.requests import Request
from gdn_jax.generation.sampling import Options
from gdn_jax.generation.sizes import SHORTEST_PIECE, Sizes, power_of_two
from gdn_jax.generation.state import Row
from gdn_jax.generation.steps import Prompts


def next_pieces(reading: list[Request], sizes: Sizes) -> tuple[list[Request], Prompts]:
    """The next tokens of those that have most to read, so that rows of a call are of
    like lengths; and whose they are."""
    reading = sorted(reading, key=lambda request: -request.unread)
    most = sizes.prefill_tokens
    T = max(power_of_two(reading[0].unread), SHORTEST_PIECE)
    T = min(T, power_of_two(most + 1) // 2)
    N = min(power_of_two(len(reading)), max(1, most // T), sizes.num_rows)
    return reading[:N], _pieces(reading[:N], N, T, sizes)


def _pieces(requests: list[Request], N: int, T: int, sizes: Sizes) -> Prompts:
    """The next T tokens at most of N prompts at most, and rows that fill the batch."""
    taken = [request.row for request in requests]
    others = [row for row in range(sizes.num_rows) if row not in taken]
    tables: dict[str, Any] = dict(
        rows=np.array((taken + others)[:N], np.int32),
        tokens=np.zeros((N, T), np.int32),
        next_tokens=np.zeros((N, T), np.int32),
        num_tokens=np.zeros(N, np.int32),
        is_first=np.zeros(N, bool),
        is_last=np.zeros(N, bool),
    )
    for n, request in enumerate(requests):
        begin = request.prefilled
        piece = request.prompt[begin : begin + T]
        after = request.prompt[begin + 1 : begin + T + 1]
        tables["tokens"][n, : len(piece)] = piece
        tables["next_tokens"][n, : len(after)] = after
        tables["num_tokens"][n] = len(piece)
        tables["is_first"][n] = begin == 0
        tables["is_last"][n] = request.unread == len(piece)
    return Prompts(asked=asked_rows(requests, N, sizes.max_stop), **tables)


def asked_rows(requests: list[Request], N: int, max_stop: int) -> Row:
    """What was asked for, [N, ...]; rows without a request hold anything."""

    def column(values: list, dtype: Any) -> Any:
        return np.array(values + [0] * (N - len(values)), dtype)

    stop: Any = np.full((N, max_stop), -1, np.int32)
    words: Any = np.zeros((N, 2), np.uint32)
    for n, request in enumerate(requests):
        stop[n, : len(request.stop)] = request.stop
        words[n] = [(request.seed >> shift) % 2**32 for shift in (32, 0)]
    options = Options(
        column([request.temperature for request in requests], np.float32),
        column([request.top_p for request in requests], np.float32),
        column([request.top_k for request in requests], np.int32),
    )
    return Row(
        jax.random.wrap_key_data(words, impl="threefry2x32"),
        options,
        stop,
        limit=column([request.limit for request in requests], np.int32),
    )
