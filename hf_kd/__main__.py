"""`python -m hf_kd` is the console command `hf-kd`."""

import sys

from .cli import main

sys.exit(main())
