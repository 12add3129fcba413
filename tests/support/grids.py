"""Grids of options, thinned out: every two values of different options meet in some case.

With UNETPP_FAST_ALL_OPTIONS=1 every combination is a case.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence

ALL = os.environ.get("UNETPP_FAST_ALL_OPTIONS") == "1"


def pairs_of(options: Sequence[Sequence], every: bool = ALL) -> list[tuple]:
    """Cases with a value of each of the `options`; in their order, those first that bring the most new pairs."""
    indices = list(itertools.product(*(range(len(values)) for values in options)))
    if every:
        chosen = indices
    else:
        places = list(itertools.combinations(range(len(options)), 2))
        missing = {(a, b, case[a], case[b]) for case in indices for a, b in places}
        chosen = []
        while missing:
            best = max(indices, key=lambda case: sum((a, b, case[a], case[b]) in missing for a, b in places))
            chosen.append(best)
            missing -= {(a, b, best[a], best[b]) for a, b in places}
    return [tuple(values[k] for values, k in zip(options, case, strict=True)) for case in sorted(chosen)]
