"""Batches for the language model: scenes, their visual rows and conversations about them.

Shapes:
    B scenes, P patches, N visual rows kept, C conversations a scene, L tokens, A label groups.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from labels import classes, patch_labels
from language import conversation
from render import PATCHES, render
from tokenizer import PREFIX, next_question_text, question_text
from world import Scene, draw_scene

END = "</s>"
BUCKET = 32  # lengths are rounded up to a multiple, so that few shapes are compiled
_OBJECT_PREFERENCE = 2.0  # log-odds by which an object's patch is kept before a background patch


@dataclass(frozen=True)
class Batch:
    """One training batch, in NumPy.

    Attributes:
        pixels: [B, 128, 128, 3] float32 in [-1, 1].
        classes: [B, P, A] int32, rows of the table of label classes.
        kept: [B, N] int32, ascending: the patches whose visual tokens are read.
        tokens: [B, C, L] int32, padded with `pad`.
        weights: [B, C, L] float32: 1 where the *next* token is part of an answer.
    """

    pixels: NDArray[np.float32]
    classes: NDArray[np.int32]
    kept: NDArray[np.int32]
    tokens: NDArray[np.int32]
    weights: NDArray[np.float32]


class Conversations:
    """Turns scenes into token rows.

    Args:
        tokenizer: The demo's.
        kinds: The conversations about a scene; "list+question" asks for a list, then a question.
    """

    def __init__(self, tokenizer: Tokenizer, kinds: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._kinds = kinds
        self.pad = tokenizer.token_to_id("<pad>")
        self.prefix = self.encode(PREFIX)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def _turn(
        self, scene: Scene, kind: str, first: bool, rng: random.Random
    ) -> tuple[list[int], list[int]]:
        prompt, answer = conversation(scene, kind, rng)
        asked = self.encode((question_text if first else next_question_text)(prompt))
        answered = self.encode(answer + END)
        return asked + answered, [0] * (len(asked) - 1) + [1] * len(answered) + [0]

    def rows(self, scene: Scene, rng: random.Random) -> list[tuple[list[int], list[int]]]:
        """(tokens, weights) of each conversation about the scene."""
        out = []
        for kinds in self._kinds:
            turns = [
                self._turn(scene, kind, i == 0, rng) for i, kind in enumerate(kinds.split("+"))
            ]
            out.append(
                ([t for turn in turns for t in turn[0]], [w for turn in turns for w in turn[1]])
            )
        return out


def keep_patches(
    owners: NDArray[np.int8], count: int, rng: np.random.Generator
) -> NDArray[np.int32]:
    """A random subset [B, count] of the patches, objects' patches preferred; all if count >= P."""
    if count >= PATCHES:
        return np.tile(np.arange(PATCHES, dtype=np.int32), (len(owners), 1))
    scores = rng.gumbel(size=owners.shape) + _OBJECT_PREFERENCE * (owners > 0)
    return np.sort(np.argpartition(-scores, count, axis=1)[:, :count], axis=1).astype(np.int32)


def make_batch(conversations: Conversations, start: int, size: int, num_kept: int) -> Batch:
    """The batch of scenes start, ..., start + size - 1; a function of its arguments alone."""
    pixels, labels, owners, rows = [], [], [], []
    for seed in range(start, start + size):
        rng = random.Random(seed)
        scene = draw_scene(rng)
        image, owner = render(scene, seed)
        pixels.append(image.astype(np.float32) / 127.5 - 1)
        labels.append(classes(patch_labels(scene, owner)))
        owners.append(owner)
        rows.append(conversations.rows(scene, rng))
    longest = max(len(tokens) for each in rows for tokens, _ in each)
    length = -(-longest // BUCKET) * BUCKET
    shape = (size, len(rows[0]), length)
    tokens = np.full(shape, conversations.pad, np.int32)
    weights = np.zeros(shape, np.float32)
    for b, each in enumerate(rows):
        for c, (ids, weight) in enumerate(each):
            tokens[b, c, : len(ids)] = ids
            weights[b, c, : len(ids)] = weight
    kept = keep_patches(np.stack(owners), num_kept, np.random.default_rng(start))
    return Batch(np.stack(pixels), np.stack(labels), kept, tokens, weights)
