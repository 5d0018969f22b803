"""Launch configs that cannot be."""

import re

import jaxtyping
import pytest

from gdn_jax import ChunkConfig, ConvConfig, GroupedDotConfig, LaunchConfig


@pytest.fixture(autouse=True)
def _as_users_run_it(monkeypatch):
    """The tests' type checker would answer a wrong config before the library does."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


WRONG = [
    (
        LaunchConfig,
        dict(block_v=True, lanes_v=1),
        "block_v must be a positive int; got T",
    ),
    (LaunchConfig, dict(block_v=0, lanes_v=1), "block_v must be a positive int; got 0"),
    (
        LaunchConfig,
        dict(block_v=8.0, lanes_v=1),
        "block_v must be a positive int; got 8.0",
    ),
    (LaunchConfig, dict(block_v=8, lanes_v=4, tiles=0), "tiles must be a positive int"),
    # aborts the process in LLVM
    (
        LaunchConfig,
        dict(block_v=8, lanes_v=4, num_warps=3),
        "num_warps must be a power of two; got 3",
    ),
    (
        LaunchConfig,
        dict(block_v=64, lanes_v=1, num_warps=64),
        "num_warps must be at most 32, CUDA's limit of a block; got 64",
    ),
    (
        LaunchConfig,
        dict(block_v=2, lanes_v=4),
        "every warp has lanes_v...block_v=2, lanes_v=4",
    ),
    (
        LaunchConfig,
        dict(block_v=64, lanes_v=64),
        "every warp has lanes_v <= 32 ...lanes_v=64",
    ),
    (
        LaunchConfig,
        dict(block_v=8, lanes_v=4, num_warps=4),
        "every warp has lanes_v...num_warps=4)...block_v >= lanes_v * num_warps",
    ),
    (ChunkConfig, dict(block_v=8), "block_v must be 16 to 256; got 8"),
    (ChunkConfig, dict(num_stages=0), "num_stages must be a positive int; got 0"),
    (ChunkConfig, dict(num_warps=3), "num_warps must be a power of two; got 3"),
    (ChunkConfig, dict(prepare_warps=64), "prepare_warps must be at most 32, CUDA's"),
    (
        ChunkConfig,
        dict(block_v=16, num_warps=32),
        "num_warps must be at most block_v; got ...",
    ),
    # Triton pads a smaller product, with wrong results
    (
        GroupedDotConfig,
        dict(block_l=8, block_f=64, block_d=64),
        "block_l must be 16 to 256; got 8",
    ),
    (
        GroupedDotConfig,
        dict(block_l=16, block_f=512, block_d=64),
        "block_f must be 16 to 256; got 512",
    ),
    (
        GroupedDotConfig,
        dict(block_l=16, block_f=64, block_d=48),
        "block_d must be a power of two; got 48",
    ),
    (
        GroupedDotConfig,
        dict(block_l=16, block_f=64, block_d=64, num_stages=0),
        "num_stages must be a positive int; got 0",
    ),
    (ConvConfig, dict(tokens=0, ahead=1), "tokens must be a positive int; got 0"),
    (ConvConfig, dict(tokens=8, ahead=3), "ahead must be a power of two; got 3"),
    (ConvConfig, dict(tokens=8, ahead=True), "ahead must be a positive ...; got True"),
    (ConvConfig, dict(tokens=8, ahead=8, each=2.0), "each must be a positive ...2.0"),
    (ConvConfig, dict(tokens=8, ahead=8, parts=-2), "parts must be a positive ...-2"),
    (ConvConfig, dict(tokens=8, ahead=8, num_warps=3), "num_warps must be a power of"),
    (ConvConfig, dict(tokens=8, ahead=16), "ahead must be at most tokens = 8, ...16"),
    (
        ConvConfig,
        dict(tokens=8, ahead=8, num_warps=64),
        "num_warps must be at most 32, CUDA's limit of a block; got 64",
    ),
]


@pytest.mark.parametrize(("config", "fields", "text"), WRONG)
def test_a_wrong_config_is_told(config, fields, text):
    parts = (re.escape(part) for part in text.split("..."))
    with pytest.raises(ValueError, match=".*".join(parts)):
        config(**fields)
