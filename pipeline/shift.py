"""Whether the held-out pairs look like the gallery: what was measured on them tells little where they do not.

The nearest-neighbour two-sample test (Schilling, JASA 1986; Henze, Annals of Statistics 1988) on old embeddings, which
both have: of a pooled sample, the share of neighbours that come from the same side. Pure.
"""

from __future__ import annotations

import numpy as np

from pipeline.nearest import nearest
from pipeline.schema import Float32

_NEIGHBOURS = 10
_MOST = 2000
APART = 0.6
"""From here on a warning is due: of equally many images from both sides, six of ten neighbours are from the same."""


def same_side(pairs: Float32, gallery: Float32, seed: int) -> float:
    """The share of nearest neighbours from the same side: 0.5 where both look alike, 1 where they are apart.

    Args:
        pairs: (M, d) float32.
        gallery: (N, d) float32; of both at most 2,000 are taken, equally many, by chance.
        seed: of that chance.
    """
    rng, count = np.random.default_rng(seed), min(len(pairs), len(gallery), _MOST)
    pool = np.concatenate([side[rng.permutation(len(side))[:count]] for side in (pairs, gallery)])
    rows = np.arange(len(pool))
    _, found = nearest(pool, pool, min(_NEIGHBOURS, len(pool) - 1), rows)
    return float(((found < count) == (rows < count)[:, None]).mean())
