r"""Published drafters and ours, trained on the same answers for the same number of steps.

    python study_peers.py --model ../../flash_mlx/demo/target --answers runs/answers.jsonl \
        --output runs/study --tune
    python study_peers.py --model ../../flash_mlx/demo/target --answers runs/answers.jsonl \
        --output runs/study --seeds 1 2 3

Sizes are alike (three heads of 64, an MLP of 768, the target's embedding and LM head). Two recipes
are tried with one seed each on ours and on EAGLE, told apart on scenes that are not reported: the
published objective by AdamW, and our objective by Muon. The other published drafters take what is
better for EAGLE, and keep their own training on predictions (`rollout`). Each drafter is then
measured in several ways to draft, and the table takes the best bound. What takes another time to
train than ours also gets a run with as many steps as fit in that time (`--equal-time`). With
`--steps 400` all train longer; ours is then the study's own row (`study.py --only "400 steps"`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import flash_mlx  # noqa: F401  (binds a fast BLAS before MLX is imported)
import mlx.core as mx

from flash_mlx.decode import Drafter
from flash_mlx.draft import NgramDrafter
from flash_mlx.draft.drafter import FlashDrafter
from flash_mlx.draft.eagle import EagleModel
from flash_mlx.draft.msd import MsdModel
from flash_mlx.draft.one_layer import OneLayerModel
from flash_mlx.draft.stepwise import StepwiseDrafter
from flash_mlx.draft.vispec import ViSpecModel
from flash_mlx.targets import load_target
from flash_mlx.train import LossWeights
from flash_mlx.train.config import PRESETS, configure
from one_layer import HiddenVisionModel, MiddleTapModel, one_layer_config, train_one_layer
from study import Study, key_of, read_rows, summary
from study_measure import HeldOut
from study_variants import LONG, TRAIN, Variant


def _objective(losses: LossWeights) -> dict[str, Any]:
    """All shares, as `configure` takes them."""
    return {f"losses.{name}": share for name, share in asdict(losses).items()}


def _published(method: str) -> dict[str, Any]:
    """Of a published recipe, what is no matter of scale: objectives, noise, own predictions."""
    recipe = PRESETS[method]
    kept = {name: recipe[name] for name in ("hidden_noise", "rollout") if name in recipe}
    return kept | _objective(recipe["losses"])


EAGLE, VISPEC = _published("msd"), _published("vispec")
OURS = _objective(LossWeights())
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW 5e-3": {"optimizer": "adamw", "learning_rate": 5e-3},
    "Muon 4e-2": {"optimizer": "muon", "learning_rate": 4e-3},
}
GRID = (("published", "AdamW 5e-3"), ("ours", "Muon 4e-2"))


@dataclass(frozen=True)
class Peer:
    """A method.

    Attributes:
        network: Its network with one layer; None: the library's own trainer and network.
        sizes: Settings of the network that differ.
        published: Settings of training that it publishes.
        tuned_as: Whose tuning it takes; empty: its own.
        blocks: Lengths of the chains that are tried in decoding, the longest at temperature 1 too.
        trees: Likewise (drafts of a tree, branches, levels), for networks with one layer.
    """

    network: type[OneLayerModel] | None = None
    sizes: Mapping[str, Any] = field(default_factory=dict)
    published: Mapping[str, Any] = field(default_factory=dict)
    tuned_as: str = ""
    blocks: tuple[int, ...] = (3, 6)
    trees: tuple[tuple[int, int, int], ...] = ()


NO_CORRECTION = {"recurrent_size": 0, "norm_inputs": False}
TREES = ((15, 4, 5),)
PEERS: dict[str, Peer] = {
    "ours": Peer(published=OURS),
    "EAGLE": Peer(EagleModel, {}, EAGLE, trees=TREES),
    "MSD": Peer(MsdModel, {}, EAGLE, "EAGLE", trees=TREES),
    "ViSpec": Peer(ViSpecModel, {"num_queries": 2}, VISPEC, "EAGLE", trees=TREES),
    "HiViS-style": Peer(HiddenVisionModel, {}, EAGLE | {"rollout": 1}, "EAGLE", trees=TREES),
    "DREAM-style tap": Peer(MiddleTapModel, {}, EAGLE, "EAGLE", trees=TREES),
    "FLASH, V-base": Peer(
        None,
        NO_CORRECTION | {"block_size": 4, "num_latents": 64},
        EAGLE,
        "EAGLE",
        blocks=(2, 4),
    ),
    "FLASH, V-final": Peer(
        None,
        NO_CORRECTION | {"block_size": 4, "num_latents": 64, "hydra_size": 24},
        EAGLE,
        "EAGLE",
        blocks=(2, 4),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--steps", type=int, default=TRAIN["iterations"])
    parser.add_argument("--equal-time", action="store_true")
    parser.add_argument("--only", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--scenes", type=int, default=20, help="of each family")
    parser.add_argument("--sampled", type=int, default=5, help="of these, at temperature 1 too")
    args = parser.parse_args()
    loaded = load_target(args.model)
    study = PeerStudy(Study(loaded, args.answers, args.output, args.scenes, args.sampled))
    if args.tune:
        for name in args.only:
            study.tune(name)
    for seed in args.seeds:
        study.lookup()
        for name in args.only:
            study.run(name, seed, args.steps, equal_time=args.equal_time)


def settings_of(peer: Peer, recipe: str, optimizer: str) -> dict[str, Any]:
    """What `configure` takes for a recipe of `GRID`; own predictions belong to the method."""
    return {
        **TRAIN,
        **(peer.published if recipe == "published" else OURS),
        **({"rollout": 1} if "rollout" in peer.published else {}),
        **OPTIMIZERS[optimizer],
    }


class PeerStudy:
    """What runs share."""

    def __init__(self, study: Study) -> None:
        self.study, self.loaded = study, study.loaded
        self.rows = study.folder / "peers.jsonl"
        self.done = {row["key"]: row for row in read_rows(self.rows)}
        self.tuning = HeldOut.of(study.loaded, study.folder, 10, 0, tuning=True)

    def tune(self, name: str) -> None:
        """Try all recipes with one seed, on scenes that are not reported."""
        if PEERS[name].tuned_as:
            return
        for recipe, optimizer in GRID:
            key = f"tuning {name}: {recipe}, {optimizer}"
            self.record(key, name, recipe, optimizer, 1, TRAIN["iterations"])

    def best(self, name: str) -> tuple[str, str]:
        """Return recipe and optimiser of the highest acceptance on the tuning scenes."""

        def length(row: Mapping[str, Any]) -> float:
            results = row["tuning"].values()
            return sum(sum(r["tokens"]) for r in results) / sum(sum(r["rounds"]) for r in results)

        tuned = PEERS[name].tuned_as or name
        rows = [r for k, r in self.done.items() if k.startswith(f"tuning {tuned}:")]
        row = max(rows, key=length)
        return row["recipe"], row["optimizer"]

    def run(self, name: str, seed: int, steps: int, *, equal_time: bool = False) -> None:
        """Train with the best recipe, for these steps or for the time that ours takes for them."""
        recipe, optimizer = self.best(name)
        budget = "" if steps == TRAIN["iterations"] else f", {steps} steps"
        key = f"{name}, seed {seed}{budget}"
        tried = f"tuning {name}: {recipe}, {optimizer}"
        if not (equal_time or budget) and tried in self.done and self.done[tried]["seed"] == seed:
            self.write(self.done[tried] | {"key": key})
            return
        if equal_time:
            own = self.done[key]["train_seconds"]
            row = (
                self.study.found[key_of(LONG, seed)] if budget else self.done[f"ours, seed {seed}"]
            )
            ours = row["train_seconds"]
            if 1 / 1.1 < own / ours < 1.1:
                return
            steps, key = int(steps * ours / own), f"{key}, equal time"
        self.record(key, name, recipe, optimizer, seed, steps)

    def lookup(self) -> None:
        """Prompt lookup has nothing to train."""
        if "prompt lookup" not in self.done:
            held_out, target = self.study.held_out, self.loaded.target
            ways = {
                f"chain of {k}": {"rows": k + 1, "results": held_out.measure(target, drafter)}
                for k in (3, 6)
                for drafter in (NgramDrafter(k),)
            }
            self.write({"key": "prompt lookup", "name": "prompt lookup", "ways": ways})

    def record(
        self,
        key: str,
        name: str,
        recipe: str,
        optimizer: str,
        seed: int,
        steps: int,
    ) -> None:
        """Train and measure, unless there is a row."""
        if key in self.done:
            return
        peer = PEERS[name]
        settings = settings_of(peer, recipe, optimizer) | {"iterations": steps}
        began, worked = time.time(), time.process_time()
        make = self.train(peer, settings, seed)
        seconds = time.process_time() - worked
        target = self.study.tapped(make.taps(self.study.num_layers))
        held_out = self.study.held_out
        ways: dict[str, Any] = {}
        tuning: dict[str, Any] = {}
        for way, rows, drafter in self.drafters(peer, make):
            if not (tuning or peer.tuned_as):
                tuning = self.tuning.measure(target, drafter)
            results = held_out.measure(target, drafter, sampled=not ways)
            ways[way] = {"rows": rows, "results": results}
        row = {
            "key": key,
            "name": name,
            "seed": seed,
            "recipe": recipe,
            "optimizer": optimizer,
            "steps": steps,
            "train_seconds": round(seconds, 2),
            "seconds": round(time.time() - began, 2),
            "tuning": tuning,
            "ways": ways,
        }
        self.write(row)

    def write(self, row: dict[str, Any]) -> None:
        with self.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.done[row["key"]] = row
        for way, found in row["ways"].items():
            print(row["key"], way, summary(row | found), flush=True)

    def train(self, peer: Peer, settings: dict[str, Any], seed: int) -> Any:
        """Return the trained network."""
        if peer.network is None:
            return self.study.train(Variant(peer.sizes, settings), seed)
        mx.random.seed(seed)
        model = peer.network(one_layer_config(self.loaded, **peer.sizes))
        known = {k: v for k, v in settings.items() if k != "base_share"}
        config = replace(configure("ours", known), seed=seed)
        source = self.study.examples
        if layers := model.taps(self.study.num_layers)[1:]:  # the embeddings are known
            source = self.study.wide(source, layers)
        train_one_layer(model, self.loaded, source, config)
        return model

    def drafters(self, peer: Peer, model: Any) -> list[tuple[str, int, Drafter[Any]]]:
        """Return the ways to draft: name, rows of a verification, drafter."""
        target = self.loaded.target
        if peer.network is None:
            return [
                (f"chain of {k}", k + 1, FlashDrafter(model, target.embed, target.lm_head, k))
                for k in reversed(peer.blocks)
            ]

        def stepwise(block: int, **tree: int) -> StepwiseDrafter:
            shaped = peer.network(replace(model.config, **tree))
            shaped.update(model.parameters())
            return StepwiseDrafter(shaped, target.embed, target.lm_head, target.vocab_size, block)

        ways = [(f"chain of {k}", k + 1, stepwise(k)) for k in reversed(peer.blocks)]
        trees = [
            (f"tree of {n}, {b} x {d}", n + 1, stepwise(d, num_nodes=n, top_k=b))
            for n, b, d in peer.trees
        ]
        return [*ways, *trees]


if __name__ == "__main__":
    main()
