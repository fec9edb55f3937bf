"""Our training step beside a plain PyTorch loop: `mtl bench step`.

python -m benchmarks.step [--backbone resnet18 --precision bf16 ...]
"""

from __future__ import annotations

import sys

from mtl_dist.cli import app

if __name__ == "__main__":
    app(["bench", "step", *sys.argv[1:]])
