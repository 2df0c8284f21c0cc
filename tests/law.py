"""Whether draws have a law.

The distance between an observed and an exact law is their total variation. The bound below is
passed by chance once in 10^5 tests; keys are fixed, so in fact always or never.

Shapes:
    n: draws.
"""

import numpy as np

from flash_mlx.measure import noise_floor


def assert_law(counts: np.ndarray, law: np.ndarray) -> None:
    """Fail if the counts of n draws are too far from the exact law to be drawn from it."""
    n = counts.sum()
    bound = noise_floor(law, n, chance=1e-5)
    distance = np.abs(counts / n - law).sum() / 2
    assert distance < bound, f"total variation {distance:.4f}, at most {bound:.4f} by chance"
