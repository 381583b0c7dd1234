"""``python -m rlnas_fast.cli``."""

import sys

from .main import main

sys.exit(main())
