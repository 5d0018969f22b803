"""Continuous batching: requests wait in a queue for rows of one state."""

from __future__ import annotations  # so that help() names types and expands none

import collections
import os
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdn_jax.generation import saving, steps
from gdn_jax.generation.interrupts import Interrupts
from gdn_jax.generation.prompts import next_pieces
from gdn_jax.generation.requests import Figures, Request, TokenIds, make_request
from gdn_jax.generation.sizes import (
    Sizes,
    block_bytes,
    check_memory,
    check_sizes,
    too_large,
)
from gdn_jax.generation.state import Emitted, EngineState, init_state, state_bytes
from gdn_jax.models.sharded import AnyModel, check_params, groups_of
from gdn_jax.ops import checks


class Engine:
    """Generates the texts of many prompts, of any lengths, in rows of one state.

        >>> from gdn_jax import Engine, models
        >>> model, params = models.load(models.SMALL, progress=False)
        >>> engine = Engine(model, params, num_rows=2, num_positions=64)
        >>> texts = [engine.submit(text, max_tokens=8) for text in ([65], [66])]
        >>> for changed in engine.run():        # the requests that gained tokens
        ...     pass
        >>> [len(request.tokens) for request in texts]
        [8, 8]

    A request takes a free row, its prompt is read in pieces, beside those of others,
    and its text grows in blocks of up to `steps_per_call` steps that run on the device
    without its host. Between blocks texts that ended free their rows. So a text waits
    for prompts that begin beside it, but never for two rounds of them on end.

    The state is a value, `engine.state`; every jitted function is shared between
    engines of the same model and sizes. One thread at a time may use an engine.

    Attributes:
      state: what is on the device, an `EngineState`.
      sizes: as it was made.
      queue: requests that wait for a row.
      running: by row, requests that have one.
      figures: counts since the engine was made.
    """

    def __init__(
        self,
        model: AnyModel,
        params: Any,
        *,
        num_rows: int = 8,
        num_positions: int = 2048,
        speculative: int = 0,
        steps_per_call: int = 16,
        prefill_tokens: int = 2048,
        max_stop: int = 4,
        recurrent_dtype: Any = jnp.float32,
        decode: str | None = None,
    ):
        """Makes an engine with empty rows.

        Args:
          model, params: as `models.load` or `models.load_sharded` gives them. Of
            several processes each makes the same engine and the same calls.
          num_rows: P, texts that grow at once; of a `ShardedModel` a multiple of its
            groups.
          num_positions: M, tokens of the longest prompt with its text and drafts.
          speculative: D, drafts of a step by the multi-token prediction head, 8 at
            most; 0 for plain decoding.
          steps_per_call: most steps of a block, num_positions at most; tokens are seen
            after each block.
          prefill_tokens: most tokens of prompts read in one call, padding included; of
            a `ShardedModel` by each of its groups.
          max_stop: most tokens of a request's `stop`.
          recurrent_dtype: of the rule's states, see `GatedDeltaNet.init_state`.
          decode: how a text goes on: "in_place" (a state each, without drafts),
            "checkpoints" (a state for each token of a step, without drafts the same as
            in place) or "replay" (one state and records of the tokens since, see
            `replay_update`). None: the fastest that was measured for so many rows on
            this GPU; elsewhere in place, or with drafts by checkpoints.

        Raises:
          ValueError: a size is wrong, the model cannot draft, or the parameters are
            not its.
          MemoryError: the device has no room for the state.
        """
        check_params(model, params)
        sizes = check_sizes(
            model,
            num_rows=num_rows,
            num_positions=num_positions,
            speculative=speculative,
            steps_per_call=steps_per_call,
            prefill_tokens=prefill_tokens,
            max_stop=max_stop,
            recurrent_dtype=recurrent_dtype,
            decode=decode,
        )
        self._begin(model, params, sizes)
        with self._memory_errors():
            self.state: EngineState = init_state(model, sizes)

    def _begin(self, model: AnyModel, params: Any, sizes: Sizes) -> None:
        self.model, self.params, self.sizes = model, params, sizes
        self.queue: collections.deque[Request] = collections.deque()
        self.running: dict[int, Request] = {}
        self.figures = Figures()
        self._submitted = 0
        self._own: weakref.WeakSet[Request] = weakref.WeakSet()
        self._interrupts = Interrupts()
        check_memory(sizes, self.state_bytes + block_bytes(sizes))

    @property
    def requests(self) -> list[Request]:
        """Those that are not finished, in the order they came."""
        unfinished = *self.running.values(), *self.queue
        return sorted(unfinished, key=lambda request: request.number)

    @property
    def state_bytes(self) -> int:
        """Of a device's memory, that the state takes."""
        return state_bytes(self.model, self.sizes)

    def submit(
        self,
        prompt: TokenIds,
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        stop: TokenIds | None = None,
    ) -> Request:
        """Queues a prompt; `run` fills the request that comes back.

        Args:
          prompt: token ids.
          max_tokens: most new tokens.
          temperature, top_p, top_k: as in `sampling.Options`; those of requests that
            run at once may differ.
          seed: any int, of which the last 64 bits count. Of this request alone: its
            draws depend on no other's, and are those of another with the same seed.
          stop: tokens that end the text; None: those of the config's `eos_token_id`
            that the vocabulary has; (): none.

        Raises:
          ValueError: the request is wrong, or longer than the model has learned or
            than the engine has room for.
        """
        config = self.model.config
        if stop is None:
            stop = [token for token in config.eos_token_id if token < config.vocab_size]
        request = make_request(
            self._submitted,
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=stop,
            config=config,
            sizes=self.sizes,
        )
        self._submitted += 1
        self._own.add(request)
        self.queue.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request of this engine, if it has not ended; what it has stays.

        Raises:
          ValueError: it is another engine's, or no request.
        """
        is_request = isinstance(request, Request)
        if not is_request or request not in self._own:
            got = f"number {request.number} of another" if is_request else repr(request)
            remedy = "Give what `submit` gave; a restored engine has its own."
            checks.fail("request", got, "a Request of this engine", remedy)
        if request.finish_reason is not None:
            return
        if request.row is None:
            self.queue.remove(request)
        else:
            self._check_state()
            self._stop(request)
        request.finish_reason = "cancelled"

    def run(self) -> Iterator[list[Request]]:
        """Works until nothing waits and no text grows; yields after each call.

        Yields the requests that gained tokens. Ctrl-C during a call, in the main
        thread, waits for its end: once its tokens are yielded, KeyboardInterrupt is
        raised with the state whole, so that the engine can be saved, or `run` again. If
        the loop was left by then, the engine's next `step`, `run` or `save` raises it.
        A second Ctrl-C does not wait, and may lose the state.

        Raises:
          MemoryError, RuntimeError: as `step`.
        """
        while self.queue or self.running:
            self._interrupts.deliver()
            with self._interrupts:
                changed = self.step()
            yield changed
        self._interrupts.deliver()

    def step(self) -> list[Request]:
        """One call of the device: a piece of prompts if any is unread, else a block.

        Returns the requests that gained tokens.

        Raises:
          MemoryError: the device has no room for the call.
          RuntimeError: the state was lost in a call that failed.
        """
        self._interrupts.deliver()
        if not self.running:
            self._admit()
        if not self.running:
            return []
        reading = [request for request in self.running.values() if request.unread]
        if reading:
            return self._prefill(reading)
        changed = self._decode()
        self._admit()  # after a block only, so that texts go on between prompts
        return changed

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a file that `restore` reads, replaced whole or not at all.

        It holds the state and the requests that are not finished, with their tokens so
        far, but not the model's parameters. To be called between calls, as in the body
        of a loop over `run`.

        Args:
          path: of the file; folders above it that are missing are made.

        Raises:
          IsADirectoryError, NotADirectoryError: no file can be there.
          RuntimeError: the state was lost in a call that failed.
          NotImplementedError: other processes have parts of the state.
        """
        self._interrupts.deliver()
        self._check_state()
        notes = saving.Notes(
            saving.fingerprint(self.model),
            self.sizes,
            [*self.running.values(), *self.queue],
            self.figures,
            self._submitted,
        )
        saving.save(path, self.state, notes)

    @classmethod
    def restore(
        cls, path: str | os.PathLike[str], model: AnyModel, params: Any
    ) -> Engine:
        """The engine that was saved, with the model and parameters that it had.

        Its texts go on bit for bit as they would have, on the same device and versions.
        `engine.requests` are those that were not finished, by their numbers.

        Raises:
          FileNotFoundError: no such file.
          ValueError: it is no engine's file, or of another config or dtype, or what it
            says of its sizes and requests is not so; or the parameters are not of the
            model's shapes. Values are not compared: with others the texts go on from
            states that are not theirs.
          MemoryError: the device has no room for the state.
        """
        check_params(model, params)
        notes = saving.load_notes(path, model)
        engine = cls.__new__(cls)
        engine._begin(model, params, notes.sizes)
        with engine._memory_errors():
            engine.state = saving.load_state(path, model, notes)
        for request in notes.requests:
            engine._own.add(request)
            if request.row is None:
                engine.queue.append(request)
            else:
                engine.running[request.row] = request
        engine.figures = notes.figures
        engine._submitted = notes.submitted
        return engine

    def _memory_errors(self) -> AbstractContextManager[None]:
        return checks.memory_errors(lambda: too_large(self.sizes, self.state_bytes))

    def _check_state(self) -> None:
        if self.state.token.is_deleted():
            raise RuntimeError(
                "the engine's state was lost in a call that failed or was interrupted "
                "while it had the state's memory. Restore what was saved last, or make "
                "a new engine and submit `requests` again."
            )

    def _admit(self) -> None:
        free = [row for row in range(self.sizes.num_rows) if row not in self.running]
        groups = groups_of(self.model)  # each has as many rows, and gets them in turn
        free.sort(key=lambda row: row % (self.sizes.num_rows // groups))
        for row, _ in zip(free, range(len(self.queue)), strict=False):
            request = self.queue.popleft()
            request.row = row
            self.running[row] = request

    def _prefill(self, reading: list[Request]) -> list[Request]:
        placed, prompts = next_pieces(reading, self.sizes, groups_of(self.model))
        drafting = self.sizes.speculative > 0 and bool(prompts.is_last.any())
        emitted = self._call(steps.prefill, prompts, drafting)
        for request, count in zip(placed, prompts.num_tokens.tolist(), strict=True):
            if request is not None:
                request.prefilled += count
            self.figures.prefilled += count
        return self._take(emitted)

    def _decode(self) -> list[Request]:
        greedy = all(request.is_greedy for request in self.running.values())
        emitted = self._call(steps.decode, self.sizes.steps_per_call, greedy)
        self.figures.decoded += int(emitted.num_tokens.sum())
        self.figures.steps += int(emitted.steps)
        self.figures.accepted += int(emitted.accepted.sum())
        self.figures.row_steps += int(emitted.row_steps.sum())
        return self._take(emitted)

    def _call(self, function: Any, *args: Any) -> Emitted:
        """Nothing on the host changes before the call is known to have succeeded."""
        self._check_state()
        with self._memory_errors():
            variables = {"params": self.params}
            state, emitted = function(self.model, variables, self.state, *args)
            emitted = jax.device_get(emitted)
        self.state = state
        return emitted

    def _take(self, emitted: Emitted) -> list[Request]:
        changed = []
        for row, request in list(self.running.items()):
            count = int(emitted.num_tokens[row])
            if count:
                request.take(
                    emitted.tokens[row, :count].tolist(),
                    emitted.log_probabilities[row, :count].tolist(),
                )
                changed.append(request)
            if request.finish_reason == "nan":
                self._stop(request)
            elif request.finish_reason is not None:
                self._release(request)
        return changed

    def _stop(self, request: Request) -> None:
        """Ends a text that the device would go on with."""
        ended = np.zeros(self.sizes.num_rows, bool)
        ended[request.row] = True
        self.state = steps.stop_rows(self.state, ended)
        self._release(request)

    def _release(self, request: Request) -> None:
        self.running = {
            row: other for row, other in self.running.items() if other is not request
        }
        request.row = None
