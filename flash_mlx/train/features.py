"""The target's hidden states on disk, for runs that come back to the same answers.

Training reads the target anew for each batch, or keeps what fits in memory. Where the target is
slow and the disk large, its states can be written down once instead: in shards of some examples
each, at 16 bits or 32. A shard is written as a whole or not at all, so an interrupted run goes on
after the last one, and several runs, of other recipes too, may share a folder: an example is found
by what the target read, its pictures included, and by which target that was.

Shapes:
    T: rows of an example.    D: hidden size, or the width of what is handed out with taps.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, cast

import mlx.core as mx

from flash_mlx.files import read_header, replacing
from flash_mlx.train.data import Example

SHARD_BYTES = 64 << 20

Stored = Literal["float16", "bfloat16", "float32"]
DTYPES: dict[str, mx.Dtype] = {
    "float16": mx.float16,
    "bfloat16": mx.bfloat16,
    "float32": mx.float32,
}


class FeatureCache:
    """A folder of shards.

    Attributes:
        folder: Where they lie.
    """

    def __init__(self, folder: Path, stored: Stored, width: int) -> None:
        """See what is there.

        Args:
            folder: Made if need be.
            stored: What the states are stored as.
            width: Of a row: D, or more for drafters with taps.

        Raises:
            OSError: If the folder cannot be made or read.
            ValueError: If a shard is damaged.
        """
        self.folder, self._stored, self._width = folder, stored, width
        folder.mkdir(parents=True, exist_ok=True)
        self._shards: dict[str, Path] = {}
        for file in sorted(folder.glob(f"*.{self._kind}")):
            self._shards |= dict.fromkeys(read_header(file), file)

    def missing(self, examples: Sequence[Example]) -> list[Example]:
        """Return those that are not there, each once."""
        wanted = {_key(example): example for example in examples}
        return [example for key, example in wanted.items() if key not in self._shards]

    def size(self, examples: Sequence[Example]) -> int:
        """Return what examples take [bytes]."""
        rows = sum(len(example.tokens) for example in examples)
        return rows * self._width * DTYPES[self._stored].size

    def require_room(self, needed: int) -> int:
        """Return the free space of the disk [bytes].

        Raises:
            OSError: If that is less than what is needed.
        """
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"The disk must hold the target's states, {needed / 1e6:.0f} MB; {self.folder} "
                f"has {free / 1e6:.0f} MB left. Name another folder, limit the data, or leave "
                "--cache-features out."
            )
        return free

    def fill(
        self,
        examples: Sequence[Example],
        read: Callable[[Example], mx.array],
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        """Write examples down.

        Args:
            examples: Those that are `missing`.
            read: Takes an example to the target's states, [T, D].
            progress: Told after each.

        Raises:
            OSError: If a shard cannot be written; those before it stay.
            ValueError: If a state is too large for float16.
        """
        shard: dict[str, mx.array] = {}
        for example in examples:
            states = read(example).astype(DTYPES[self._stored])
            if not mx.isfinite(states).all().item():
                raise ValueError(
                    f"The target's states must be finite numbers; as {self._stored} some are not. "
                    "Store them as bfloat16 or float32."
                )
            shard[_key(example)] = states
            if sum(each.nbytes for each in shard.values()) >= SHARD_BYTES:
                self._write(shard)
                shard = {}
            progress()
        if shard:
            self._write(shard)

    def get(self, example: Example, dtype: mx.Dtype) -> mx.array:
        """Return the states of an example that is there, [T, D].

        Raises:
            OSError: If its shard has gone.
        """
        key = _key(example)
        arrays = cast(dict[str, mx.array], mx.load(str(self._shards[key])))
        states = arrays[key].astype(dtype)
        mx.eval(states)
        return states

    @property
    def _kind(self) -> str:
        return f"{self._stored}-{self._width}.safetensors"

    def _write(self, shard: dict[str, mx.array]) -> None:
        # All of its keys: runs that share a folder may begin two shards with the same example.
        name = hashlib.sha256("".join(shard).encode("ascii")).hexdigest()
        file = self.folder / f"{name}.{self._kind}"
        with replacing(file) as new:
            mx.save_safetensors(str(new), shard)
        self._shards |= dict.fromkeys(shard, file)


def _key(example: Example) -> str:
    """Return the SHA-256 of what an example's states depend on."""
    return hashlib.sha256(json.dumps([example.digest, example.tokens]).encode()).hexdigest()
