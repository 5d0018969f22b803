"""Continuous batching: requests wait in a queue for rows of one state."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdn_jax.generation import steps
from gdn_jax.generation.interrupts import Interrupts
from gdn_jax.generation.requests import Request, check_request
from gdn_jax.generation.sampling import Options
from gdn_jax.generation.state import Emitted, EngineState, Row, init_state
from gdn_jax.models.model import Model
from gdn_jax.ops import checks

SHORTEST_PIECE = 16  # of a prompt; shorter ones are padded to it


@dataclasses.dataclass
class Figures:
    """What an engine has done since it was made.

    Attributes:
      prefilled: tokens of prompts.
      decoded: tokens of texts, but each one's first.
      steps: decoding steps.
      accepted, row_steps: tokens that whole steps of single rows gave, and how many.
    """

    prefilled: int = 0
    decoded: int = 0
    steps: int = 0
    accepted: int = 0
    row_steps: int = 0

    @property
    def mean_accepted(self) -> float:
        """Tokens a row gains by a step: 1 without drafts."""
        return self.accepted / self.row_steps if self.row_steps else 1.0


class Engine:
    """Generates the texts of many prompts, of any lengths, in rows of one state.

        engine = Engine(model, params, num_rows=8, num_positions=2048)
        requests = [engine.submit(prompt, max_tokens=100) for prompt in prompts]
        for changed in engine.run():        # the requests that gained tokens
            ...

    A request takes a free row, its prompt is read in pieces, beside those of others, and
    its text grows in blocks of up to `steps_per_call` steps that run on the device
    without its host. Between blocks texts that ended free their rows.

    The state is a value, `engine.state`; every jitted function is shared between engines
    of the same model and sizes.

    Attributes:
      state: what is on the device, an `EngineState`.
      queue: requests that wait for a row.
      running: by row, requests that have one.
      figures: counts since the engine was made.
    """

    def __init__(
        self,
        model: Model,
        params: Any,
        *,
        num_rows: int = 8,
        num_positions: int = 2048,
        speculative: int = 0,
        steps_per_call: int = 16,
        prefill_tokens: int = 2048,
        max_stop: int = 4,
        recurrent_dtype: Any = jnp.float32,
    ):
        """Makes an engine with empty rows.

        Args:
          model, params: as `models.load` gives them.
          num_rows: P, texts that grow at once.
          num_positions: M, tokens of the longest prompt with its text and drafts.
          speculative: D, drafts of a step by the multi-token prediction head; 0 for
            plain decoding.
          steps_per_call: most steps of a block; tokens are seen after each block.
          prefill_tokens: most tokens of prompts read in one call, padding included.
          max_stop: most tokens of a request's `stop`.
          recurrent_dtype: of the rule's states, see `GatedDeltaNet.init_state`.

        Raises:
          ValueError: a size is wrong, or the model cannot draft.
        """
        sizes = dict(
            num_rows=num_rows,
            num_positions=num_positions,
            steps_per_call=steps_per_call,
            max_stop=max_stop,
        )
        for name, size in sizes.items():
            if size < 1:
                checks.fail(name, size, ">= 1", "It is a size.")
        if prefill_tokens < SHORTEST_PIECE:
            remedy = "Shorter pieces are padded to it."
            checks.fail("prefill_tokens", prefill_tokens, f">= {SHORTEST_PIECE}", remedy)
        if speculative < 0:
            checks.fail("speculative", speculative, ">= 0", "It is a count of drafts.")
        if speculative and model.config.num_mtp_layers != 1:
            checks.fail(
                "speculative",
                speculative,
                f"0 for a model with {model.config.num_mtp_layers} MTP layers",
                "One layer drafts; without it, or with more, decode plainly.",
            )
        self.model, self.params = model, {"params": params}
        self.num_positions, self.speculative = num_positions, speculative
        self.steps_per_call, self.prefill_tokens = steps_per_call, prefill_tokens
        self.max_stop = max_stop
        self.state: EngineState = init_state(
            model, num_rows, num_positions, speculative, max_stop, recurrent_dtype
        )
        self.queue: collections.deque[Request] = collections.deque()
        self.running: dict[int, Request] = {}
        self.figures = Figures()
        self._submitted = 0

    @property
    def num_rows(self) -> int:
        return self.state.token.shape[0]

    def submit(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        stop: Sequence[int] | None = None,
    ) -> Request:
        """Queues a prompt; `run` fills the request that comes back.

        Args:
          prompt: token ids.
          max_tokens, temperature, top_p, top_k: as in `generate`.
          seed: of this request alone: its text depends on no other's.
          stop: tokens that end the text; None: the config's `eos_token_id`.

        Raises:
          ValueError: the request is wrong, or longer than the engine has room for.
        """
        stop = self.model.config.eos_token_id if stop is None else stop
        request = Request(
            self._submitted,
            tuple(int(token) for token in prompt),
            max_tokens,
            float(temperature),
            float(top_p),
            top_k,
            seed,
            tuple(int(token) for token in stop),
        )
        check_request(
            request,
            self.model.config.vocab_size,
            self.num_positions,
            self.speculative,
            self.max_stop,
        )
        self._submitted += 1
        self.queue.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request; what it has stays."""
        if request.finish_reason is not None:
            return
        if request.row is None:
            self.queue.remove(request)
        else:
            ended = np.zeros(self.num_rows, bool)
            ended[request.row] = True
            self.state = steps.stop_rows(self.state, ended)
            self._release(request)
        request.finish_reason = "cancelled"

    def run(self) -> Iterator[list[Request]]:
        """Works until nothing waits and no text grows; yields after each call.

        Yields the requests that gained tokens. Ctrl-C, in the main thread, ends the
        iteration after the call at hand, with the state whole: `run` again goes on.
        """
        with Interrupts() as interrupts:
            while (self.queue or self.running) and not interrupts.came:
                yield self.step()

    def step(self) -> list[Request]:
        """One call of the device: a piece of prompts if any waits, else a block."""
        self._admit()
        reading = [r for r in self.running.values() if r.prefilled < len(r.prompt)]
        if reading:
            emitted = self._prefill(reading)
        else:
            self.state, emitted = steps.decode(
                self.model, self.params, self.state, self.steps_per_call
            )
        return self._take(jax.device_get(emitted), is_prefill=bool(reading))

    def _admit(self) -> None:
        free = (row for row in range(self.num_rows) if row not in self.running)
        for row in list(free):
            if not self.queue:
                return
            request = self.queue.popleft()
            request.row = row
            self.running[row] = request

    def _prefill(self, reading: list[Request]) -> Emitted:
        left = max(len(r.prompt) - r.prefilled for r in reading)
        T = min(_bucket(left, SHORTEST_PIECE), _bucket(self.prefill_tokens + 1) // 2)
        N = min(_bucket(len(reading)), max(1, self.prefill_tokens // T), self.num_rows)
        prompts = self._pieces(reading[:N], N, T)
        self.state, emitted = steps.prefill(
            self.model, self.params, self.state, prompts
        )
        return emitted

    def _pieces(self, reading: list[Request], N: int, T: int) -> steps.Prompts:
        """The next T tokens at most of some prompts, and rows that fill the batch."""
        taken = [request.row for request in reading]
        others = [row for row in range(self.num_rows) if row not in taken]
        rows = np.array((taken + others)[:N], np.int32)
        tokens, behind = np.zeros((2, N, T), np.int32)
        num_tokens = np.zeros(N, np.int32)
        is_first, is_last = np.zeros((2, N), bool)
        for n, request in enumerate(reading):
            begin = request.prefilled
            piece = request.prompt[begin : begin + T]
            after = request.prompt[begin + 1 : begin + T + 1]
            tokens[n, : len(piece)], behind[n, : len(after)] = piece, after
            num_tokens[n] = len(piece)
            request.prefilled += len(piece)
            is_first[n] = begin == 0
            is_last[n] = request.prefilled == len(request.prompt)
            self.figures.prefilled += len(piece)
        asked = _asked(reading, N, self.max_stop)
        return steps.Prompts(
            rows, tokens, behind, num_tokens, is_first, is_last, asked
        )

    def _take(self, emitted: Emitted, is_prefill: bool) -> list[Request]:
        changed = []
        for row, request in list(self.running.items()):
            count = int(emitted.count[row])
            if count:
                request.take(
                    emitted.tokens[row, :count].tolist(),
                    emitted.log_probabilities[row, :count].tolist(),
                )
                changed.append(request)
            if request.finish_reason is not None:
                self._release(request)
        if not is_prefill:
            self.figures.decoded += int(emitted.count.sum())
        self.figures.steps += int(emitted.steps)
        self.figures.accepted += int(emitted.accepted.sum())
        self.figures.row_steps += int(emitted.row_steps.sum())
        return changed

    def _release(self, request: Request) -> None:
        del self.running[request.row]
        request.row = None


def _asked(requests: list[Request], N: int, max_stop: int) -> Row:
    def column(values: list, dtype: Any) -> np.ndarray:
        return np.array(values + [0] * (N - len(values)), dtype)

    stop = np.full((N, max_stop), -1, np.int32)
    for n, request in enumerate(requests):
        stop[n, : len(request.stop)] = request.stop
    seeds = column([request.seed for request in requests], np.uint32)
    make = jax.vmap(lambda seed: jax.random.key(seed, impl="threefry2x32"))
    options = Options(
        column([request.temperature for request in requests], np.float32),
        column([request.top_p for request in requests], np.float32),
        column([request.top_k for request in requests], np.int32),
    )
    limit = column([request.limit for request in requests], np.int32)
    return Row(make(seeds), options, stop, limit)


def _bucket(size: int, least: int = 1) -> int:
    """The next power of two: few shapes, so few compilations."""
    return max(least, 1 << (size - 1).bit_length())
