"""What balancing costs, beside torchjd and LibMTL where they are installed: `mtl bench balance`.

python -m benchmarks.balance [--backbone resnet18 --tasks 3 ...]
"""

from __future__ import annotations

import sys

from mtl_dist.cli import app

if __name__ == "__main__":
    app(["bench", "balance", *sys.argv[1:]])
