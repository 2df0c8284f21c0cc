"""Whether draws have a law.

The distance between an observed and an exact law is their total variation. For n independent
draws over cells of probability p its mean is at most sum(sqrt(p (1 - p) / n)) / 2, because a
cell's mean absolute deviation is at most its standard deviation. One draw moves the distance by
1 / n at most, so by McDiarmid's inequality it exceeds its mean by t with probability
exp(-2 n t^2) at most. The bound below is passed by chance once in 10^5 tests; keys are fixed, so
in fact always or never.

Shapes:
    n: draws.
"""

import numpy as np


def assert_law(counts: np.ndarray, law: np.ndarray) -> None:
    """Fail if the counts of n draws are too far from the exact law to be drawn from it."""
    n = counts.sum()
    mean = np.sqrt(law * (1 - law) / n).sum() / 2
    bound = mean + np.sqrt(np.log(1e5) / (2 * n))
    distance = np.abs(counts / n - law).sum() / 2
    assert distance < bound, f"total variation {distance:.4f}, at most {bound:.4f} by chance"
