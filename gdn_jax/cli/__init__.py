"""The command line: `gdn-jax`, or `python -m gdn_jax`."""

from gdn_jax.cli.ctrl_c import CtrlC


def main() -> None:
    with CtrlC():
        # Here, since JAX's own imports take a second.
        from gdn_jax.cli.commands import app

        app()
