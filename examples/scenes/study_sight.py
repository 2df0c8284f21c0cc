r"""Does the drafter see? Latents of another picture, and what can be read off latents.

    python study_sight.py --model ../../flash_mlx/demo/target --answers runs/answers.jsonl \
        --output runs/study --draft-model ../../flash_mlx/demo/drafter

Another picture: the drafter gets the target's states at the image rows of another prompt; the
target's own passes and its text stay as they are. The change in acceptance is what the latents are
worth to this drafter; the text's states, which have read the right picture, stay right.

Probes: ridge regression in closed form from latents to labels of the scenes, beside the same from
what a drafter without latents has, the state of the prompt's last row.

Shapes:
    S: scenes.    F: features.    C: classes.    M: latents.    N: rows of an image.    D: hidden.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import flash_mlx  # noqa: F401  (binds a fast BLAS before MLX is imported)
import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flash_mlx.checkpoint import load_model
from flash_mlx.draft import FlashDrafter, FlashModel
from flash_mlx.targets import LoadedTarget, load_target
from replay import Recording, ReplayTarget
from study_data import Examples, asked_of, load_examples
from study_measure import HeldOut
from world import COLOURS, MAX_OBJECTS, SHAPES, Scene, draw_scene

Floats = npt.NDArray[np.float64]
RIDGES = (1.0, 10.0, 100.0, 1000.0, 10000.0)
RESAMPLES = 4000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--draft-model", type=Path, required=True)
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=50, help="of each family")
    args = parser.parse_args()
    loaded = load_target(args.model)
    model = load_model(args.draft_model)
    examples = load_examples(loaded, args.answers, args.output / "target_answers")
    scenes = [draw_scene(random.Random(number)) for number, _ in asked_of(args.answers)]
    found = {
        "probes": probe(model, examples, scenes),
        "another picture": swap(loaded, model, args.output, args.scenes),
    }
    (args.output / "sight.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def swap(loaded: LoadedTarget, model: FlashModel, folder: Path, count: int) -> dict[str, Any]:
    """Acceptance at temperature 0 with latents of the right picture, and of another one."""
    target = loaded.target
    held_out = HeldOut.of(loaded, folder, count, 0)
    drafter = FlashDrafter(model, target.embed, target.lm_head)
    right = held_out.measure(target, drafter)
    for family in held_out.prompts:
        known = held_out.recordings[target, family]
        held_out.recordings[target, family] = [
            ReplayTarget(target, _with_picture_of(one.recording, other.recording))
            for one, other in zip(known, [*known[1:], *known[:1]], strict=True)
        ]
    wrong = held_out.measure(target, drafter)
    return {name: _compare(right[name], wrong[name]) for name in right}


def _with_picture_of(one: Recording, other: Recording) -> Recording:
    """A recording whose image rows are those of another one."""
    (start, stop), (first, last) = one.prompt.image_spans[0], other.prompt.image_spans[0]
    rows = [one.hidden[:start], other.hidden[first:last], one.hidden[stop:]]
    return replace(one, hidden=mx.concatenate(rows))


def _compare(right: dict[str, Any], wrong: dict[str, Any]) -> dict[str, Any]:
    """Both mean acceptance lengths, and their ratio with a bootstrap interval over prompts."""
    pairs = [np.array([r["tokens"], r["rounds"]], dtype=np.float64) for r in (right, wrong)]
    rng = np.random.default_rng(0)
    draws = rng.integers(0, pairs[0].shape[1], (RESAMPLES, pairs[0].shape[1]))
    lengths = [tokens[draws].sum(1) / rounds[draws].sum(1) for tokens, rounds in pairs]
    low, high = np.quantile(lengths[1] / lengths[0], [0.025, 0.975])
    return {
        "prompts": pairs[0].shape[1],
        "right": round(float(np.divide(*pairs[0].sum(1))), 3),
        "another": round(float(np.divide(*pairs[1].sum(1))), 3),
        "ratio_low": round(float(low), 4),
        "ratio_high": round(float(high), 4),
    }


def probe(model: FlashModel, examples: Examples, scenes: Sequence[Scene]) -> dict[str, Any]:
    """Share of right answers on a fifth of the scenes, by features and by question."""
    latents, pooled, last = [], [], []
    for number in range(len(scenes)):
        example = examples.examples[2 * number]
        start, stop = example.prompt.image_spans[0]
        rows = examples.rows(2 * number).astype(np.float32)
        latents.append(np.array(model.latents(mx.array(rows[start:stop]))).ravel())
        pooled.append(rows[start:stop].mean(0))
        last.append(rows[len(example.prompt) - 1])
    features = {
        f"{model.config.num_latents} latents": np.array(latents, np.float64),
        "mean of the image rows": np.array(pooled, np.float64),
        "last row of the prompt": np.array(last, np.float64),
    }
    questions = {
        "count": [len(scene.objects) - 1 for scene in scenes],
        "place": [scene.place for scene in scenes],
        "colour of the first object": [scene.objects[0].colour for scene in scenes],
        "shape of the first object": [scene.objects[0].shape for scene in scenes],
        "cell of the first object": [scene.objects[0].cell for scene in scenes],
    }
    presence = {
        "colours present": [{o.colour for o in scene.objects} for scene in scenes],
        "shapes present": [{o.shape for o in scene.objects} for scene in scenes],
    }
    sizes = {"colours present": len(COLOURS), "shapes present": len(SHAPES)}
    table: dict[str, Any] = {"scenes": len(scenes), "held out": len(scenes) // 5}
    for question, labels in questions.items():
        classes = np.eye(max(max(labels) + 1, MAX_OBJECTS))[labels]
        table[question] = {name: _accuracy(x, classes) for name, x in features.items()}
        table[question]["always the commonest"] = round(float(classes.mean(0).max()), 3)
    for question, sets in presence.items():
        marks = np.array([[c in found for c in range(sizes[question])] for found in sets], float)
        table[question] = {name: _balanced(x, marks) for name, x in features.items()}
        table[question]["always the commonest"] = 0.5
    return table


def _accuracy(features: Floats, classes: Floats) -> float:
    """Share of held-out scenes whose class [S, C] has the highest score."""
    scores, truth = _ridge(features, classes)
    return round(float((scores.argmax(1) == truth.argmax(1)).mean()), 3)


def _balanced(features: Floats, marks: Floats) -> float:
    """Mean over marks [S, C] of the mean of the shares found right where it is, where it is not."""
    scores, truth = _ridge(features, marks)
    right = (scores > marks.mean(0)) == (truth > 0.5)  # rare marks have low scores
    shares = [
        (right[truth[:, c] > 0.5, c].mean() + right[truth[:, c] < 0.5, c].mean()) / 2
        for c in range(truth.shape[1])
    ]
    return round(float(np.mean(shares)), 3)


def _ridge(features: Floats, wanted: Floats) -> tuple[Floats, Floats]:
    """Scores and truth of the last fifth; the ridge that is best on the fifth before it.

    Args:
        features: [S, F].
        wanted: [S, C].
    """
    fifth = len(features) // 5
    first, end = len(features) - 2 * fifth, len(features) - fifth
    x = (features - features[:first].mean(0)) / (features[:first].std(0) + 1e-6)
    mean = wanted[:first].mean(0)
    inner = x @ x[:end].T / x.shape[1]  # as many unknowns as scenes, not as features

    def scores(known: int, ridge: float, asked: slice) -> Floats:
        kernel = inner[:known, :known] + ridge / x.shape[1] * np.eye(known)
        solved = np.linalg.solve(kernel, wanted[:known] - mean)
        out: Floats = inner[asked, :known] @ solved + mean
        return out

    tried = {
        ridge: ((scores(first, ridge, slice(first, end)) - wanted[first:end]) ** 2).mean()
        for ridge in RIDGES
    }
    best = min(tried, key=lambda ridge: tried[ridge])
    return scores(end, best, slice(end, None)), wanted[end:]


if __name__ == "__main__":
    main()
