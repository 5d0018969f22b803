"""JAX arrays as torch tensors, and what torch peers share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import numpy as np

from peers.call import Inputs, Problem

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Tensors:
    """A problem's inputs, the state apart, in memory that torch owns."""

    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    A_log: Tensor
    dt_bias: Tensor
    slots: list[Tensor]

    @classmethod
    def of(cls, inputs: Inputs) -> Tensors:
        names = ("q", "k", "v", "a", "b", "A_log", "dt_bias")
        slots = [copy(table) for table in inputs["slots"]]
        return cls(**{name: copy(inputs[name]) for name in names}, slots=slots)

    def rows(self, problem: Problem) -> dict[str, Tensor]:
        """The per-token inputs as [N, T, ...], which peers without packing take."""
        names = ("q", "k", "v", "a", "b")
        size = (problem.N, problem.T)
        return {name: getattr(self, name).unflatten(0, size) for name in names}


def view(array: jax.Array) -> Tensor:
    """A JAX array as a torch tensor in the same memory: to read only."""
    import torch

    return torch.from_dlpack(jax.block_until_ready(array))


def copy(array: jax.Array) -> Tensor:
    """A JAX array's values in a dense tensor that torch owns and may write."""
    import torch

    return view(array).clone(memory_format=torch.contiguous_format)


def warm_up(run: Callable[[int], None], state: Tensor, slots: Tensor) -> None:
    """Compiles by one call, and puts the slots it wrote back to what they were."""
    import torch

    rows = slots.flatten().long()
    before = state[rows]
    run(0)
    state[rows] = before
    torch.cuda.synchronize()


def named(part: str) -> Callable[[str], bool]:
    """Whether a device kernel's name holds this part."""
    return lambda name: part in name


def to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().float().numpy()
