"""python -m gdn_jax: the command line."""

from gdn_jax.cli import main

main()
