"""How long the first batch takes at the start of a large epoch and at 90% of it: `mtl bench resume`.

python -m benchmarks.resume [--samples 10000000 --repeats 5 ...]
"""

from __future__ import annotations

import sys

from mtl_dist.cli import app

if __name__ == "__main__":
    app(["bench", "resume", *sys.argv[1:]])
