"""python -m gdn_jax: the command line."""

from gdn_jax.cli import main

if __name__ == "__main__":
    main()
