"""Run `python -m jaxmm.cli` as the command `jaxmm`."""

import sys

from jaxmm.cli import main

sys.exit(main())
