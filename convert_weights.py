"""Weights in and out, checked both ways: `proteus convert`, from the repository."""

import sys

from proteus_jax.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
