"""Our loader beside others, over the same JPEGs: `mtl bench loader`, with the images of the data folder.

python -m benchmarks.loader [--workers 0 --repeats 3 ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

from mtl_dist.cli import app

IMAGES = Path(__file__).parents[2] / "shared" / "data" / "pets-seg" / "pets-seg.zip"

if __name__ == "__main__":
    app(["bench", "loader", str(IMAGES), *sys.argv[1:]])
