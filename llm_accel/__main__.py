"""``python -m llm_accel`` is ``llm-accel``."""

import sys

from llm_accel.cli import main

sys.exit(main())
