"""Batches for the language model: scenes or clips, their visual rows, conversations about them.

Shapes:
    B scenes or clips, F pictures of each (1 of a scene), P patches of a picture, N of these kept,
    C conversations, L tokens, A label groups.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from clip_language import clip_conversation
from clips import Clip, draw_clip, moments

from labels import classes, patch_labels
from language import conversation
from render import PATCHES, render
from tokenizer import PREFIX, next_question_text, question_text
from world import Scene, draw_scene

END = "</s>"
BUCKET = 32  # lengths are rounded up to a multiple, so that few shapes are compiled
_QUALITY = (50, 96)  # of JPEG, through which half of the clips pass: files of videos are lossy
_OBJECT_PREFERENCE = 2.0  # log-odds by which an object's patch is kept before a background patch


@dataclass(frozen=True)
class Batch:
    """One training batch, in NumPy.

    Attributes:
        pixels: [B, F, 128, 128, 3] float32 in [-1, 1].
        classes: [B, F, P, A] int32, rows of the table of label classes.
        kept: [B, F, N] int32, ascending: the patches whose visual tokens are read.
        tokens: [B, C, L] int32, padded with `pad`.
        weights: [B, C, L] float32: 1 where the *next* token is part of an answer.
    """

    pixels: NDArray[np.float32]
    classes: NDArray[np.int32]
    kept: NDArray[np.int32]
    tokens: NDArray[np.int32]
    weights: NDArray[np.float32]


Shown = TypeVar("Shown", Scene, Clip)
Say = Callable[[Shown, str, random.Random], tuple[str, str]]


class Conversations(Generic[Shown]):
    """Turns scenes or clips into token rows.

    Args:
        tokenizer: The demo's.
        kinds: The conversations about each; "list+question" asks for a list, then a question.
        say: Prompt and answer of a kind.
    """

    def __init__(self, tokenizer: Tokenizer, kinds: tuple[str, ...], say: Say[Shown]) -> None:
        self._tokenizer = tokenizer
        self._kinds = kinds
        self._say = say
        self.pad = tokenizer.token_to_id("<pad>")
        self.prefix = self.encode(PREFIX)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def _turn(
        self, shown: Shown, kind: str, first: bool, rng: random.Random
    ) -> tuple[list[int], list[int]]:
        prompt, answer = self._say(shown, kind, rng)
        asked = self.encode((question_text if first else next_question_text)(prompt))
        answered = self.encode(answer + END)
        return asked + answered, [0] * (len(asked) - 1) + [1] * len(answered) + [0]

    def rows(self, shown: Shown, rng: random.Random) -> list[tuple[list[int], list[int]]]:
        """(tokens, weights) of each conversation."""
        out = []
        for kinds in self._kinds:
            turns = [
                self._turn(shown, kind, i == 0, rng) for i, kind in enumerate(kinds.split("+"))
            ]
            out.append(
                ([t for turn in turns for t in turn[0]], [w for turn in turns for w in turn[1]])
            )
        return out


def scene_conversations(tokenizer: Tokenizer, kinds: tuple[str, ...]) -> Conversations[Scene]:
    return Conversations(tokenizer, kinds, conversation)


def clip_conversations(tokenizer: Tokenizer, kinds: tuple[str, ...]) -> Conversations[Clip]:
    return Conversations(tokenizer, kinds, clip_conversation)


def keep_patches(
    owners: NDArray[np.int8], count: int, rng: np.random.Generator
) -> NDArray[np.int32]:
    """A random subset [..., count] of the patches, objects' patches preferred; all if count >= P.

    Args:
        owners: [..., P] int8, above 0 at objects.
        count: Patches to keep of each picture.
        rng: Chooses.
    """
    if count >= PATCHES:
        return np.broadcast_to(np.arange(PATCHES, dtype=np.int32), owners.shape)
    scores = rng.gumbel(size=owners.shape) + _OBJECT_PREFERENCE * (owners > 0)
    chosen = np.argpartition(-scores, count, axis=-1)[..., :count]
    return np.sort(chosen, axis=-1).astype(np.int32)


def token_rows(
    rows: list[list[tuple[list[int], list[int]]]], pad: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Conversations' tokens and weights [B, C, L], padded."""
    longest = max(len(tokens) for each in rows for tokens, _ in each)
    shape = (len(rows), len(rows[0]), -(-longest // BUCKET) * BUCKET)
    tokens, weights = np.full(shape, pad, np.int32), np.zeros(shape, np.float32)
    for b, each in enumerate(rows):
        for c, (ids, weight) in enumerate(each):
            tokens[b, c, : len(ids)] = ids
            weights[b, c, : len(ids)] = weight
    return tokens, weights


def make_batch(conversations: Conversations[Scene], start: int, size: int, num_kept: int) -> Batch:
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
    kept = keep_patches(np.stack(owners)[:, None], num_kept, np.random.default_rng(start))
    tokens, weights = token_rows(rows, conversations.pad)
    return Batch(np.stack(pixels)[:, None], np.stack(labels)[:, None], kept, tokens, weights)


def as_stored(pictures: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """Pictures [F, S, S, 3] as JPEG keeps them."""
    out = []
    for picture in pictures:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=quality)
        out.append(np.asarray(Image.open(file)))
    return np.stack(out)


def make_clip_batch(
    conversations: Conversations[Clip], start: int, size: int, num_kept: int
) -> Batch:
    """The batch of clips start, ..., start + size - 1, as the pictures of their moments.

    Clips have no labels of patches: `classes` is empty [B, F, P, 0].
    """
    pixels, owners, rows = [], [], []
    for seed in range(start, start + size):
        rng = random.Random(seed)
        clip = draw_clip(rng)
        pictures, owner = moments(clip, seed)
        if rng.random() < 0.5:
            pictures = as_stored(pictures, rng.randrange(*_QUALITY))
        pixels.append(pictures.astype(np.float32) / 127.5 - 1)
        owners.append(owner)
        rows.append(conversations.rows(clip, rng))
    kept = keep_patches(np.stack(owners), num_kept, np.random.default_rng(start))
    tokens, weights = token_rows(rows, conversations.pad)
    return Batch(
        np.stack(pixels), np.zeros((*np.shape(owners), 0), np.int32), kept, tokens, weights
    )
