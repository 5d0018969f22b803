"""Meshes of the devices that there are."""

import jax
import pytest

from gdn_jax import sharding


def mesh_of(data, model):
    """CPUs are as many as conftest.py fakes, GPUs as many as a machine has."""
    if jax.default_backend() != "cpu" and jax.device_count() < data * model:
        pytest.skip(f"needs {data * model} devices")
    return sharding.make_mesh(data, model)
