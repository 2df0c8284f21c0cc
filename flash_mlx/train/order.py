"""Which examples a batch holds: a function of the seed and the batch's number alone.

So the order need not be saved, and a run that is resumed sees what it would have seen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Epochs:
    """The order of the examples, a function of the seed alone, so that it need not be saved.

    Batches hold examples of similar length, in random order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        """Remember what the order depends on.

        Args:
            lengths: Of each example.
            batch_size: Examples in a batch; all of them, if there are fewer.
            seed: Of the order.
        """
        self._lengths, self._seed = np.array(lengths), seed
        self._batch_size = min(batch_size, len(lengths))
        self._epoch, self._batches = -1, np.zeros((0, self._batch_size), dtype=np.int64)

    def __getitem__(self, step: int) -> list[int]:
        """Return the examples of a step; an epoch may leave out less than a batch of them."""
        epoch, place = divmod(step, len(self._lengths) // self._batch_size)
        if epoch != self._epoch:
            rng = np.random.default_rng((self._seed, epoch))
            chosen = rng.permutation(len(self._lengths))
            # Alike in length, but not always with the same neighbours: a little noise.
            noise = rng.uniform(0.9, 1.1, len(chosen))
            chosen = chosen[: len(chosen) // self._batch_size * self._batch_size]
            chosen = chosen[np.argsort(self._lengths[chosen] * noise[chosen], kind="stable")]
            batches = chosen.reshape(-1, self._batch_size)
            self._epoch, self._batches = epoch, rng.permutation(batches)
        indices: list[int] = self._batches[place].tolist()
        return indices


class TextFirst:
    """Batches without pictures first, then a growing share of those with.

    Up to half of all batches none has pictures; from there the share of those that do grows
    linearly to 1. A function of the seed alone, like `Epochs`.

    Source: MSD, arXiv 2505.14260, which draws so for each example instead of each batch.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        seen: Sequence[bool],
        batch_size: int,
        seed: int,
        num_batches: int,
    ) -> None:
        """Choose the kind of every batch.

        Args:
            lengths: Of each example.
            seen: Whether it has pictures.
            batch_size: Examples in a batch.
            seed: Of the order.
            num_batches: Of the whole run.

        Raises:
            ValueError: If there are only examples of one kind.
        """
        kinds = [np.flatnonzero(np.array(seen) == kind) for kind in (False, True)]
        if not all(map(len, kinds)):
            raise ValueError(
                "Training on text first needs examples with and without pictures; got "
                f"{len(kinds[1])} with and {len(kinds[0])} without. Add rows, or mix from the "
                "beginning."
            )
        self._examples = kinds
        self._epochs = [
            Epochs([lengths[int(i)] for i in kind], batch_size, seed + place)
            for place, kind in enumerate(kinds)
        ]
        share = np.clip(np.arange(num_batches) / max(num_batches - 1, 1) * 2 - 1, 0, 1)
        draws = np.random.default_rng((seed, 1)).random(num_batches)
        self._kinds = (draws < share).astype(np.int64)
        self._places = np.where(self._kinds, np.cumsum(self._kinds), np.cumsum(1 - self._kinds)) - 1

    def __getitem__(self, step: int) -> list[int]:
        """Return the examples of a batch."""
        kind = int(self._kinds[step])
        own = self._epochs[kind][int(self._places[step])]
        chosen: list[int] = self._examples[kind][own].tolist()
        return chosen
