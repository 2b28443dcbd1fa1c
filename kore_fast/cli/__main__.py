"""``python -m kore_fast.cli``."""

import sys

from kore_fast.cli import main

sys.exit(main())
