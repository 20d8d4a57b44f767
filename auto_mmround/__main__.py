"""`python -m auto_mmround` and `accelerate launch -m auto_mmround`."""

import sys

from auto_mmround.cli import main

sys.exit(main())
