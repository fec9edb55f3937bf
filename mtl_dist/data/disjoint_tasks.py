"""Which tasks have no labelled training sample in common."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from mtl_dist.data.loader import Data

_ROWS_AT_A_TIME = 1 << 20


def disjoint_tasks(data: Data) -> list[tuple[str, str]]:
    """The pairs of tasks that are both labelled in the training data, but in no sample together.

    Reads the indexes only as far as it takes to have seen every pair.
    """
    labelled = [name for name, info in data.task_infos.items() if info.num_labelled]
    open_pairs = set(combinations(labelled, 2))
    for source in data.sources["train"]:
        for start in range(0, source.reader.num_samples, _ROWS_AT_A_TIME):
            rows = np.arange(start, min(start + _ROWS_AT_A_TIME, source.reader.num_samples))
            has = {name: source.reader.labelled(name, rows) for pair in open_pairs for name in pair}
            open_pairs -= {(a, b) for a, b in open_pairs if (has[a] & has[b]).any()}
            if not open_pairs:
                return []
    return sorted(open_pairs)
