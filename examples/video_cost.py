"""What a video costs the drafter, however long: rows that it reads, and the time of a draft.

    python examples/video_cost.py

Of the bundled demo's drafter, after videos of 1 to 64 frames with 256 visual tokens each. Once its
`video_groups` are set, neighbouring frames share their latents; with 0 each frame has its own. The
target's hidden states are random: what drafting costs depends on how many rows there are, not on
what they say.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import flash_mlx  # binds the BLAS, which works only before mlx.core is imported
import mlx.core as mx

from flash_mlx.draft.drafter import FlashDrafter
from flash_mlx.draft.model import FlashModel
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler

BEFORE, AFTER = 4, 12  # rows of text before the first frame and after the last
TOKEN = 5  # any


def video_prompt(frames: int, rows: int) -> Prompt:
    """Return a question about a video: text, frames with a row of text between, text."""
    starts = [BEFORE + frame * (rows + 1) for frame in range(frames)]
    spans = tuple((start, start + rows) for start in starts)
    return Prompt((TOKEN,) * (spans[-1][1] + AFTER), spans, videos=((0, frames),))


def measure(drafter: FlashDrafter, prompt: Prompt, repeats: int) -> tuple[int, float]:
    """Return the rows that the drafter keeps of a prompt, and the median time of a draft [s]."""
    key, size = mx.random.key(0), drafter.model.config.hidden_size
    hidden = mx.random.normal((len(prompt), size), key=key)
    state = drafter.prefill(prompt, hidden, TOKEN)
    mx.eval(state.slots)
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        later = drafter.extend(hidden[-1:], (TOKEN,), state)
        mx.eval(drafter.draft(TOKEN, later, Sampler(0.0), key).tokens)
        seconds.append(time.perf_counter() - begin)
    return state.length, statistics.median(seconds)


def main() -> None:
    """Print a line for each number of frames."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--groups", type=int, nargs="+", default=[0, 8], help="video_groups")
    parser.add_argument("--rows", type=int, default=256, help="visual tokens of a frame")
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    demo = flash_mlx.load(drafting="fixed")
    if not isinstance(demo.drafter, FlashDrafter):
        raise TypeError("The demo's drafter must be a FLASH drafter.")
    settings = vars(demo.drafter.model.config)
    for groups in args.groups:
        model = FlashModel(type(demo.drafter.model.config)(**{**settings, "video_groups": groups}))
        model.update(demo.drafter.model.parameters())
        drafter = FlashDrafter(model, demo.target.embed, demo.target.lm_head)
        for frames in args.frames:
            rows, seconds = measure(drafter, video_prompt(frames, args.rows), args.repeats)
            line = {"video_groups": groups, "frames": frames, "rows": rows}
            print(json.dumps({**line, "draft_milliseconds": round(1000 * seconds, 3)}))


if __name__ == "__main__":
    main()
