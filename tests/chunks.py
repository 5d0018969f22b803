"""What tests of the chunked update share: cases made once, and its implementations."""

import functools

import numpy as np
import pytest

from gdn_jax import testing

Case = testing.Case
PATHS = ("xla", "interpret", pytest.param("triton", marks=pytest.mark.gpu))
KERNELS = PATHS[1:]


@functools.cache
def made(case):
    args, kwargs = testing.make(case, seed=len(case.name))
    return args, kwargs, testing.oracle(args, kwargs)


def split(kwargs):
    static = {k: v for k, v in kwargs.items() if not isinstance(v, np.ndarray)}
    return static, {k: v for k, v in kwargs.items() if isinstance(v, np.ndarray)}
