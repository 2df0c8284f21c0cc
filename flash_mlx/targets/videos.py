"""Pictures and videos in one prompt of Qwen2-VL and Qwen2.5-VL.

To the vision tower a picture is a video of one frame (of two alike, which it sees as one), so a
prompt's pictures and videos are given to the model as its pictures, in their order. What differs
is how fast time passes: in Qwen2.5-VL, rows of a video's frames stand apart on the first axis of
M-RoPE by the seconds between them.

Shapes:
    T: prompt rows.    I: pictures and videos.    P: patches of all of them.

Source: Bai et al. 2025, Qwen2.5-VL, arXiv 2502.13923, section 2.1.2; the temporal axis as in the
published code (`second_per_grid_ts`), which mlx-vlm leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Inputs = Mapping[str, mx.array]


def merge_videos(
    tokens: Sequence[int], inputs: Inputs, image_id: int, video_id: int
) -> tuple[tuple[int, ...], dict[str, mx.array], list[float]]:
    """Put videos among the pictures of a prompt.

    Args:
        tokens: [T] ids.
        inputs: The processor's arrays, `pixel_values_videos` and `video_grid_thw` [videos, 3]
            among them; `video_fps` [videos] frames seen of a second.
        image_id: Id of a visual row of a picture.
        video_id: Of a video.

    Returns:
        [T] ids with visual rows of pictures only; arrays with pictures only; [I] frames of the
        video seen of a second, 0 for pictures.
    """
    grids: dict[int, list[list[int]]] = {}
    patches: dict[int, mx.array] = {}
    names = {image_id: ("pixel_values", "image_grid_thw")}
    names[video_id] = ("pixel_values_videos", "video_grid_thw")
    for kind, (pixels, grid) in names.items():
        if pixels in inputs:
            patches[kind], grids[kind] = inputs[pixels], np.array(inputs[grid]).tolist()
    fps = np.array(inputs["video_fps"]).tolist()
    visual = [token for token in tokens if token in names]
    done, taken = {image_id: 0, video_id: 0}, {image_id: 0, video_id: 0}
    parts, joined, rates = [], [], []
    row = 0
    # A square of patches makes one row, the same number in pictures and videos.
    square = sum(each.shape[0] for each in patches.values()) // len(visual)
    while row < len(visual):
        kind = visual[row]
        number, start = done[kind], taken[kind]
        count = int(np.prod(grids[kind][number]))
        parts.append(patches[kind][start : start + count])
        joined.append(grids[kind][number])
        rates.append(fps[number] if kind == video_id else 0.0)
        done[kind], taken[kind] = number + 1, start + count
        row += count // square
    others = {k: v for k, v in inputs.items() if k not in {*sum(names.values(), ()), "video_fps"}}
    arrays = {"pixel_values": mx.concatenate(parts), "image_grid_thw": mx.array(joined)}
    ids = tuple(image_id if token == video_id else token for token in tokens)
    return ids, {**others, **arrays}, rates


def mrope_positions(
    tokens: Sequence[int],
    image_id: int,
    grids: Sequence[Sequence[int]],
    steps: Sequence[float],
) -> tuple[npt.NDArray[np.int32], int]:
    """Place rows on the three axes of M-RoPE: time, line and column.

    Args:
        tokens: [T] ids, visual rows of pictures only.
        image_id: Id of a visual row.
        grids: [I] rows of each picture or video: frames, lines, columns.
        steps: [I] positions from one frame to the next.

    Returns:
        [3, T] positions, and the position of the row after the prompt minus T.
    """
    parts: list[npt.NDArray[np.signedinteger[Any]]] = []
    row = following = 0
    ids = np.array(tokens)
    for grid, step in zip(grids, steps, strict=True):
        start = row + int(np.flatnonzero(ids[row:] == image_id)[0])
        text = np.arange(following, following + start - row)
        seen = np.indices(grid).reshape(3, -1)
        seen[0] = (seen[0] * step).astype(np.int32)
        seen += following + len(text)
        parts += [np.broadcast_to(text, (3, len(text))), seen]
        row, following = start + seen.shape[1], int(seen.max()) + 1
    text = np.arange(following, following + len(ids) - row)
    parts.append(np.broadcast_to(text, (3, len(text))))
    return np.concatenate(parts, axis=1).astype(np.int32), following + len(text) - len(ids)


def merged_positions(
    config: Any, tokens: Sequence[int], grids: mx.array, rates: Sequence[float]
) -> tuple[mx.array, int]:
    """Return `mrope_positions` of what `merge_videos` made, as [3, 1, T].

    Args:
        config: The mlx-vlm model's.
        tokens: [T] ids.
        grids: [I, 3] patches: frames, lines, columns.
        rates: [I] frames seen of a second, 0 for pictures.
    """
    vision = config.vision_config
    merge = vision.spatial_merge_size
    rows = [[t, lines // merge, columns // merge] for t, lines, columns in np.array(grids).tolist()]
    # Qwen2-VL counts frames, whenever they are seen.
    timed = config.model_type == "qwen2_5_vl"
    per_second = vision.tokens_per_second * vision.temporal_patch_size if timed else 0
    steps = [per_second / rate if timed and rate else 1.0 for rate in rates]
    positions, delta = mrope_positions(tokens, config.image_token_id, rows, steps)
    return mx.array(positions)[:, None], delta
