"""Train a model: `python run_train.py [--config RECIPE] [--workdir DIR] [--any.field value]`, as `jaxmm train` does."""

import sys

from jaxmm import cli


def main(args: list[str]) -> int:
    """Run `jaxmm train` with `args` and return the exit status."""
    return cli.main(["train", *args])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
