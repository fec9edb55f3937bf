"""For all tests: one thread per process, as several ranks and workers share the cores."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
