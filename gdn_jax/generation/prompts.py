"""From requests to the arrays of a prefill call."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gdn_jax.generation.requests import Request
from gdn_jax.generation.sampling import Options
from gdn_jax.generation.sizes import SHORTEST_PIECE, Sizes, power_of_two
from gdn_jax.generation.state import Row
from gdn_jax.generation.steps import Prompts


def next_pieces(
    reading: list[Request], sizes: Sizes, groups: int = 1
) -> tuple[list[Request | None], Prompts]:
    """The next tokens of those that have most to read, so that rows of a call are of
    like lengths; and whose they are, None where a row only fills the batch.

    groups: of devices, among which the engine's rows are shared out in order, and those
    of a call as well; `prefill_tokens` bounds what each group reads.
    """
    reading = sorted(reading, key=lambda request: -request.unread)
    most = sizes.prefill_tokens
    T = max(power_of_two(reading[0].unread), SHORTEST_PIECE)
    T = min(T, power_of_two(most + 1) // 2)
    own = sizes.num_rows // groups
    of_groups = [
        [request for request in reading if request.row // own == group]
        for group in range(groups)
    ]
    longest = max(map(len, of_groups))
    N = min(power_of_two(longest), max(1, most // T), own)
    placed, rows = [], []
    for group, requests in enumerate(of_groups):
        taken = [request.row for request in requests[:N]]
        others = set(range(group * own, (group + 1) * own)) - set(taken)
        rows += (taken + sorted(others))[:N]
        placed += (requests + [None] * N)[:N]
    return placed, _pieces(placed, rows, T, sizes)


def _pieces(
    requests: list[Request | None], rows: list[int], T: int, sizes: Sizes
) -> Prompts:
    """The next T tokens at most of each prompt."""
    N = len(rows)
    tables: dict[str, Any] = dict(
        rows=np.array(rows, np.int32),
        tokens=np.zeros((N, T), np.int32),
        next_tokens=np.zeros((N, T), np.int32),
        num_tokens=np.zeros(N, np.int32),
        is_first=np.zeros(N, bool),
        is_last=np.zeros(N, bool),
    )
    for n, request in enumerate(requests):
        if request is None:
            continue
        begin = request.prefilled
        piece = request.prompt[begin : begin + T]
        after = request.prompt[begin + 1 : begin + T + 1]
        tables["tokens"][n, : len(piece)] = piece
        tables["next_tokens"][n, : len(after)] = after
        tables["num_tokens"][n] = len(piece)
        tables["is_first"][n] = begin == 0
        tables["is_last"][n] = request.unread == len(piece)
    return Prompts(asked=asked_rows(requests, sizes.max_stop), **tables)


def asked_rows(requests: Sequence[Request | None], max_stop: int) -> Row:
    """What was asked for, [N, ...]; rows without a request hold anything."""

    def column(field: str, dtype: Any) -> Any:
        return np.array([getattr(request, field, 0) for request in requests], dtype)

    N = len(requests)
    stop: Any = np.full((N, max_stop), -1, np.int32)
    words: Any = np.zeros((N, 2), np.uint32)
    for n, request in enumerate(requests):
        if request is None:
            continue
        stop[n, : len(request.stop)] = request.stop
        words[n] = [(request.seed >> shift) % 2**32 for shift in (32, 0)]
    options = Options(
        column("temperature", np.float32),
        column("top_p", np.float32),
        column("top_k", np.int32),
    )
    return Row(
        jax.random.wrap_key_data(words, impl="threefry2x32"),
        options,
        stop,
        limit=column("limit", np.int32),
    )
