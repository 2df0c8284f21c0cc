"""Captions of many pictures: found, described one by one, written down as they come.

    for caption in flash_mlx.caption(model, "photos", output="captions.jsonl", resume=True):
        print(caption.path, caption.text or caption.error)

What there is to describe (`listing`), how (`describe`), where it goes (`rows`), and all of it
together (`job`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, cast

from flash_mlx.caption.describe import BatchSize, Caption
from flash_mlx.caption.job import Job
from flash_mlx.generate import Model
from flash_mlx.video import FPS, MAX_FRAMES

__all__ = ["Caption", "Job", "caption"]

Source = str | os.PathLike[str]


def caption(
    model: Model,
    inputs: Source | Sequence[Source],
    prompt: str | None = None,
    *,
    output: Source | None = None,
    resume: bool = False,
    sidecar: bool = False,
    system: str | None = None,
    fps: float = FPS,
    max_frames: int = MAX_FRAMES,
    batch_size: BatchSize = "auto",
    **settings: Any,
) -> Iterator[Caption]:
    """Describe pictures, as many at a time as is fastest.

    Args:
        model: From `load`.
        inputs: Files, folders, globs and JSONL lists; see `find_items`.
        prompt: What to ask, or a template of it; None: to describe it in detail.
        output: File that gets a row of JSON for each caption, as soon as it is there.
        resume: Go on with an output that has rows already: see `Job`.
        sidecar: Write each caption beside its picture too, `a.png` -> `a.txt`.
        system: A message before the conversation.
        fps: Frames to read of a second of video.
        max_frames: Most frames to read of a video; they are pictures to the model, in order.
        batch_size: Texts that are decoded together; each is the text that it would be alone.
            `auto` takes what measured costs say is fastest here; 1 is one after the other.
        settings: Those of `stream_generate`. Of the `seed`, each picture gets random numbers of its
            own, by its bytes and its prompt: its text is the same in any batch and any order.

    Returns:
        The captions, errors included. They are made, and written, as they are asked for.

    Raises:
        OSError: The inputs or the output cannot be used.
        ValueError: There is nothing to describe, a setting is out of its range, or the model
            cannot decode several texts together.
    """
    one = isinstance(inputs, str | os.PathLike)
    files = [cast(Source, inputs)] if one else cast(Sequence[Source], inputs)
    job = Job(files, prompt, output=output, resume=resume, sidecar=sidecar)
    return job.run(
        model, system=system, fps=fps, max_frames=max_frames, batch_size=batch_size, **settings
    )
