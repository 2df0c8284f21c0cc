"""Does the roofline predict? It is fitted on small models and tested on a larger one.

    OPENBLAS_NUM_THREADS=1 python roofline_check.py [--json OUT] [--repeats N]

Times of the real loop are fitted on the demo with 6 and with 9 of its 12 layers, at contexts of 256
and 1280 rows and widths of 1 to 12 rows. (Fewer layers fit in a processor's cache, where bytes cost
something else.) Bytes are all that the fit knows of a model:

    plain token = p0 + p1 * weights + p2 * context                                       [s]
    round       = r0 + (r1 + r2 * C(m)) * weights + (r3 + r4 * m) * context

C(m) is what one product of the model's sizes costs here by its rows, timed alone: a BLAS likes some
numbers of rows better than others.

From that alone the speed-ups of the whole demo are predicted, at widths and contexts that were not
fitted, at a given acceptance: drafts are the next tokens of the model itself, some of them spoilt.
They are printed before they are measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flash_mlx.around import TargetAround
from flash_mlx.bench.roofline import Shape, bytes_of
from flash_mlx.decode import Cache, Drafter, NoDrafter, Output, Take, Target, decode
from flash_mlx.files import read_json
from flash_mlx.loading import DEMO
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.stats import GenerationStats
from flash_mlx.targets import MlxVlmTarget, load_target
from flash_mlx.targets.scratch import scratch_cache
from flash_mlx.tree import DraftTree, Topology
import mlx.core as mx
import numpy as np

TOKENS = 48  # of a timed text
BITS = 32  # of a weight on a CPU
GIVEN = 0.8  # chance that a draft is what the model says
WITHIN = 0.1  # of what is measured
FITTED_LAYERS, FITTED_CONTEXTS, FITTED_DRAFTS = (6, 9), (256, 1280), (0, 1, 2, 4, 7, 11)


@dataclass(frozen=True)
class Point:
    """A setting: layers of the model, rows in the cache, drafts of a round (none: plain)."""

    layers: int
    context: int
    drafts: int


TESTED = (Point(12, 512, 9), Point(12, 768, 3), Point(12, 1024, 5), Point(12, 1536, 5))


@dataclass
class Measured:
    """Seconds of a text, one entry a repeat, and what it brought; noise only ever adds."""

    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    rounds: int = 0

    @property
    def per_token(self) -> float:
        return min(self.seconds) / self.tokens

    @property
    def per_round(self) -> float:
        return min(self.seconds) / self.rounds


class Resumed(TargetAround):
    """A target whose prompt has been read already: so many rows of zeros."""

    def __init__(self, target: MlxVlmTarget, context: int) -> None:
        super().__init__(target)
        self.cache = scratch_cache(target, context)

    def make_cache(self) -> Cache:
        return self.cache

    def prefill(self, prompt: Prompt, cache: Cache, take: Take | None = None) -> Output:  # noqa: ARG002
        return Output(mx.zeros((1, self.vocab_size)), mx.zeros((1, self.hidden_size)))


class Spoilt:
    """Drafts a known text, in which some tokens are wrong; the state is the number of tokens."""

    def __init__(self, text: Sequence[int], drafts: int, vocab_size: int) -> None:
        wrong = np.random.default_rng(0).random(len(text) + drafts + 1) > GIVEN
        padded = [*text, *[0] * (drafts + 1)]
        self.text = [(t + 1) % vocab_size if w else t for t, w in zip(padded, wrong, strict=True)]
        self.drafts, self.topology = drafts, Topology.chain(drafts)

    def prefill(self, prompt: Prompt, hidden: mx.array, root: int) -> int:  # noqa: ARG002
        return 1

    def draft(self, root: int, state: int, sampler: Sampler, key: mx.array) -> DraftTree:  # noqa: ARG002
        following = self.text[state : state + self.drafts]
        return DraftTree(self.topology, mx.array([root, *following], dtype=mx.int32))

    def extend(self, hidden: mx.array, tokens: tuple[int, ...], state: int) -> int:  # noqa: ARG002
        return state + len(tokens)


def say(target: Target, drafter: Drafter[Any]) -> tuple[list[int], GenerationStats]:
    stats = GenerationStats()
    rounds = decode(
        target,
        drafter,
        Prompt((0,)),
        sampler=Sampler(),
        key=mx.random.key(0),
        max_tokens=TOKENS,
        stop_ids=(),
    )
    return [token for each in stats.watch(rounds) for token in each.tokens], stats


def cut(layers: int, folder: Path) -> MlxVlmTarget:
    """Return the demo with its first layers only."""
    source = DEMO / "target"
    for file in source.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            (folder / file.name).write_bytes(file.read_bytes())
    config: dict[str, Any] = read_json(source / "config.json")
    config["text_config"]["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config))
    dropped = [f".layers.{i}." for i in range(layers, 12)]
    weights = {
        name: weight
        for name, weight in mx.load(str(source / "model.safetensors")).items()
        if "language" not in name or not any(part in name for part in dropped)
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return load_target(folder).target


def measure(
    points: Sequence[Point], targets: dict[int, MlxVlmTarget], repeats: int
) -> dict[Point, Measured]:
    """Time texts in turns; the first turn is a warm-up."""
    texts: dict[tuple[int, int], list[int]] = {}
    found = {point: Measured() for point in points}
    for turn in range(1 + repeats):
        for point in points:
            target = Resumed(targets[point.layers], point.context)
            drafter: Drafter[Any] = NoDrafter()
            if point.drafts:
                text = texts[point.layers, point.context]
                drafter = Spoilt(text, point.drafts, target.vocab_size)
            tokens, stats = say(target, drafter)
            texts.setdefault((point.layers, point.context), tokens)
            if tokens != texts[point.layers, point.context]:
                print(f"{point}: another text than plain decoding's")
            each = found[point]
            each.tokens, each.rounds = len(tokens) - 1, stats.rounds
            if turn:
                each.seconds.append(stats.decode_seconds)
    return found


def product_cost(shape: Shape, rows: Sequence[int]) -> dict[int, float]:
    """Return C(m), of products with as many weights as the model has, so that they come anew."""
    sizes = (shape.intermediate_size, shape.hidden_size)
    weights = [mx.random.normal(sizes) for _ in range(3 * shape.layers)]
    inputs = {m: mx.random.normal((m, shape.hidden_size)) for m in rows}
    mx.eval(weights, inputs)
    best = dict.fromkeys(rows, float("inf"))
    for _ in range(60):
        for m, x in inputs.items():
            start = time.perf_counter()
            mx.eval([x @ weight.T for weight in weights])
            best[m] = min(best[m], time.perf_counter() - start)
    return {m: seconds / best[1] for m, seconds in best.items()}


def predictor(
    shapes: dict[int, Shape], cost: dict[int, float], found: dict[Point, Measured]
) -> tuple[Callable[[Point, float], float], dict[str, list[float]]]:
    """Fit the two lines of the module; return (point, tokens of a round) -> speed-up."""

    def sizes(point: Point) -> tuple[float, float]:
        shape = shapes[point.layers]
        return bytes_of(shape.weights, BITS) / 1e6, shape.context_bytes(point.context) * 2 / 1e6

    def plain_terms(point: Point) -> list[float]:
        weights, context = sizes(point)
        return [1.0, weights, context]

    def round_terms(point: Point) -> list[float]:
        weights, context = sizes(point)
        rows = 1 + point.drafts
        return [1.0, weights, weights * cost[rows], context, context * rows]

    def fit(terms: Callable[[Point], list[float]], times: dict[Point, float]) -> Any:
        # Relative errors count alike, so a short time weighs as much as a long one.
        matrix = np.array([np.array(terms(point)) / time for point, time in times.items()])
        return np.linalg.lstsq(matrix, np.ones(len(times)), rcond=None)[0]

    plain = fit(plain_terms, {p: m.per_token for p, m in found.items() if not p.drafts})
    rounds = fit(round_terms, {p: m.per_round for p, m in found.items() if p.drafts})

    def speedup(point: Point, tokens: float) -> float:
        alone = float(np.dot(plain, plain_terms(point)))
        return tokens * alone / float(np.dot(rounds, round_terms(point)))

    return speedup, {"plain": plain.tolist(), "round": rounds.tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config: dict[str, Any] = read_json(DEMO / "target" / "config.json")
    layers = sorted({*FITTED_LAYERS, *(point.layers for point in TESTED)})
    targets, shapes = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for count in layers:
            place = Path(folder) / str(count)
            place.mkdir()
            targets[count] = cut(count, place)
            text = {**config["text_config"], "num_hidden_layers": count}
            shapes[count] = Shape.from_config(f"demo, {count} layers", text)
    grid = [
        Point(count, context, drafts)
        for count in FITTED_LAYERS
        for context in FITTED_CONTEXTS
        for drafts in FITTED_DRAFTS
    ]
    fitted = measure(grid, targets, args.repeats)
    widths = {1, *(1 + point.drafts for point in (*grid, *TESTED))}
    cost = product_cost(shapes[layers[-1]], sorted(widths))
    print("C(m) of a product:", {m: round(each, 2) for m, each in cost.items()})
    speedup, coefficients = predictor(shapes, cost, fitted)

    rows = []
    tests = [Point(p.layers, p.context, drafts) for p in TESTED for drafts in (0, p.drafts)]
    given = measure(tests, targets, 0)  # what is accepted, which takes no clock
    for point in TESTED:
        tokens = given[point].tokens / given[point].rounds
        predicted = speedup(point, tokens)
        rows.append({**asdict(point), "tokens_per_pass": tokens, "predicted": predicted})
        print(f"{point}, {tokens:.2f} tokens a pass: predicted {predicted:.2f}", flush=True)
    timed = measure(tests, targets, args.repeats)
    for point, row in zip(TESTED, rows, strict=True):
        plain = timed[Point(point.layers, point.context, 0)].per_token
        row["measured"] = plain / timed[point].per_token
        row["error"] = row["predicted"] / row["measured"] - 1
        print(f"{point}: measured {row['measured']:.2f}, prediction {row['error']:+.1%} off")
    worst = max(abs(row["error"]) for row in rows)
    verdict = "within" if worst <= WITHIN else "not within"
    print(f"The worst prediction is {worst:.1%} off, {verdict} {WITHIN:.0%}.")
    if args.json is not None:
        report = {
            "fitted_on": [
                {**asdict(p), "per_token": m.per_token, "per_round": m.per_round}
                for p, m in fitted.items()
            ],
            "product_cost": cost,
            "coefficients": coefficients,
            "tested": rows,
            "tokens": TOKENS,
            "repeats": args.repeats,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
