"""``python -m kore_fast``: the command line, also for ``torchrun -m kore_fast``."""

import sys

from kore_fast.cli import main

sys.exit(main())
