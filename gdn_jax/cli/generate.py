"""`gdn-jax generate`."""


def generate() -> None:
    """stub"""
