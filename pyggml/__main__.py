"""`python -m pyggml`."""

from __future__ import annotations

import sys

from pyggml.cli import main

sys.exit(main())
