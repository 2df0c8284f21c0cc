"""Does the target see what happens in a clip? Its lists of events, against two clips.

    python evaluate_clips.py --model runs/clip_target --limit 60 --json clips.json

Clips go through video files. The same lists scored against the next clip show what guessing would
reach, and lists of clips shown from their end to their beginning what the order says.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import flash_mlx
import numpy as np

from clip_language import STEPS_PROMPTS, VIDEO_PROMPTS, standing, stated
from clips import MOMENTS, Clip, film
from flash_mlx.generate import Model
from make_clips import HELD_OUT, held_out_clip, write_video


def score(text: str, clip: Clip) -> dict[str, list[bool]]:
    """Right or wrong of each event: where all is then, what is said, what kind and who it is."""
    lines = [line.partition(". ")[2].rpartition(": ") for line in text.splitlines()[1:]]
    lines += [("", "", "")] * MOMENTS
    out: dict[str, list[bool]] = {"places": [], "event": [], "kind": [], "name": []}
    kinds = ("goes", "meets", "appears", "leaves", "nothing")
    for number in range(MOMENTS - 1):
        (places, _, said), truth = lines[number], stated(clip, number)
        out["places"].append(places == standing(clip, number + 1))
        out["event"].append(said == truth)
        kind = next(kind for kind in kinds if kind in truth)
        out["kind"].append(kind in said)
        name = truth.partition(f" {kind}")[0].split()[-2:]
        out["name"].append(said.partition(f" {kind}")[0].split()[-2:] == name)
    out["both_events"] = [all(out["event"])]
    return out


def answer(model: Model, prompt: str, pictures: np.ndarray, folder: Path) -> str:
    write_video(folder / "clip.mp4", pictures)
    video = flash_mlx.Video(folder / "clip.mp4")
    return flash_mlx.generate(model, prompt, video, max_tokens=256, temperature=0.0).text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = flash_mlx.load(args.model, draft="none")
    clips, lists, backwards, texts = [], [], [], []
    with tempfile.TemporaryDirectory() as name:
        for i in range(args.limit):
            clips.append(held_out_clip(i))
            pictures = film(clips[-1], HELD_OUT + i)
            lists.append(answer(model, STEPS_PROMPTS[i % 2], pictures, Path(name)))
            backwards.append(answer(model, STEPS_PROMPTS[i % 2], pictures[::-1], Path(name)))
            texts.append(answer(model, VIDEO_PROMPTS[i % 4], pictures, Path(name)))
    table: dict[str, dict[str, float]] = {}
    for row, said, shift in (
        ("own_clip", lists, 0),
        ("other_clip", lists, 1),
        ("backwards", backwards, 0),
    ):
        totals: dict[str, list[bool]] = {}
        for i, text in enumerate(said):
            for key, values in score(text, clips[(i + shift) % len(clips)]).items():
                totals.setdefault(key, []).extend(values)
        table[row] = {key: round(float(np.mean(values)), 4) for key, values in totals.items()}
    print(json.dumps(table, indent=2))
    if args.json:
        args.json.write_text(json.dumps({"clips": args.limit, **table, "texts": texts}) + "\n")


if __name__ == "__main__":
    main()
