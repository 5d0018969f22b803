"""One call of the grouped product in the form every implementation takes."""

import dataclasses
from typing import NamedTuple

import numpy as np

from gdn_jax import _types as t


class Inputs(NamedTuple):
    """Rows lie group after group; those past the last group's belong to none."""

    x: t.GroupedRows
    weights: t.GroupWeights
    group_sizes: t.GroupSizes


@dataclasses.dataclass(frozen=True)
class Options:
    out_dtype: np.dtype
