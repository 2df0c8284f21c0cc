r"""What each choice is worth: trains variants on one budget, measures them by decoding.

    python study.py --model ../../flash_mlx/demo/target --answers runs/answers.jsonl \
        --output runs/study --seeds 3
    python study.py --output runs/study --report

Answers about clips (`answers.py --clips`) make a study of their own, of prompts with three
pictures, in a folder of its own (`--only latents`, say: the data set's own answers are about scenes
alone). One process does all: the target's states are computed once. A row of `rows.jsonl` is a run;
what has a row is not run again. The first seed of all comes before the second of any; what stands
with one seed alone is not told from chance there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import flash_mlx  # noqa: F401  (binds a fast BLAS before MLX is imported)
from flash_mlx.draft import FlashModel
from flash_mlx.draft.drafter import FlashDrafter
from flash_mlx.targets import LoadedTarget, load_target
from flash_mlx.targets.adapter import MlxVlmTarget
from flash_mlx.targets.taps import TappedTarget
from flash_mlx.train import Example, Trainer
from flash_mlx.train.config import configure
from flash_mlx.train.initial import drafter_config, new_model, propose_frequent
from study_data import (
    Examples,
    are_clips,
    asked_of,
    load_examples,
    with_taps,
    write_data_set_answers,
)
from study_measure import HeldOut, verify_costs
from study_variants import DRAFTER, GROUPS, TRAIN, Variant
from train_drafter import family_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--scenes", type=int, default=20, help="of each family")
    parser.add_argument("--sampled", type=int, default=5, help="of these, at temperature 1 too")
    parser.add_argument("--only", nargs="*", choices=GROUPS, default=list(GROUPS))
    names = [name for variants in GROUPS.values() for name in variants]
    parser.add_argument("--variants", nargs="*", choices=names, default=names, help="of these")
    args = parser.parse_args()
    loaded = load_target(args.model)
    study = Study(loaded, args.answers, args.output, args.scenes, args.sampled)
    for seed in args.seeds:
        for group in args.only:
            for name, variant in GROUPS[group].items():
                if name not in args.variants:
                    continue
                study.run(variant, seed, f"{group}: {name}")


def key_of(variant: Variant, seed: int) -> str:
    """What tells a run from others, whatever group it stands in."""
    return json.dumps({**asdict(variant), "seed": seed}, sort_keys=True)


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


class Study:
    """What runs share."""

    def __init__(
        self, loaded: LoadedTarget, answers: Path, folder: Path, scenes: int, sampled: int
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.loaded, self.folder, self.answers = loaded, folder, answers
        self.rows = folder / "rows.jsonl"
        self.found = {row["key"]: row for row in read_rows(self.rows)}
        self.examples = load_examples(loaded, answers, folder / "target_answers")
        self.held_out = HeldOut.of(loaded, folder, scenes, sampled, clips=are_clips(answers))
        self.targets: dict[tuple[int, ...], MlxVlmTarget] = {(): loaded.target}
        if not (folder / "verify_ms.json").exists():
            costs = verify_costs(loaded, self.held_out.prompts["caption"][0])
            (folder / "verify_ms.json").write_text(json.dumps(costs))

    def run(self, variant: Variant, seed: int, name: str) -> None:
        """Train and measure, unless there is a row."""
        key = key_of(variant, seed)
        if key in self.found:
            return
        began, worked = time.time(), time.process_time()
        model = self.train(variant, seed)
        trained = time.process_time() - worked
        target = self.tapped(model.taps(self.num_layers))
        drafter = FlashDrafter(model, target.embed, target.lm_head)
        row = {
            "name": name,
            "seed": seed,
            "train_seconds": round(trained, 2),
            "results": self.held_out.measure(target, drafter),
            "seconds": round(time.time() - began, 2),
            "key": key,
        }
        with self.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.found[key] = row
        print(name, seed, summary(row), flush=True)

    def train(self, variant: Variant, seed: int) -> FlashModel:
        """Return the averaged weights after all steps."""
        config = drafter_config(self.loaded, variant.start, {**DRAFTER, **variant.drafter})
        model = new_model(self.loaded, config, variant.start, seed)
        train = configure("ours", {**TRAIN, "seed": seed, **variant.train})
        source, examples = self.choose(variant.answers)
        propose_frequent(model, (one.answer for one in examples), self.loaded.eos_ids)
        if layers := model.taps(self.num_layers):
            source = self.wide(source, layers)
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                model, source.teacher(self.loaded), examples, Path(folder) / "run", train
            )
            trainer.run()
        return trainer.averaged()

    def choose(self, answers: str) -> tuple[Examples, list[Example]]:
        """Return the examples that a variant learns from."""
        examples = self.examples.examples
        match answers:
            case "both":
                return self.examples, examples
            case "greedy":
                return self.examples, examples[0::2]
            case "sampled":
                return self.examples, examples[1::2]
            case "captions" | "questions":
                family = [family_of(prompt) for _, prompt in asked_of(self.answers)]
                return self.examples, [
                    each for i, each in enumerate(examples) if family[i // 2] == answers
                ]
            case "data set":
                file = self.folder / "data_set_answers.jsonl"
                if not file.exists():
                    write_data_set_answers(self.loaded, self.answers, file)
                own = load_examples(self.loaded, file, self.folder / "data_set_answers")
                return own, own.examples
        raise ValueError(f"There are no answers {answers!r}.")

    def wide(self, source: Examples, layers: Sequence[int]) -> Examples:
        """The target's own answers with what these layers read."""
        return with_taps(self.loaded, source, self.answers, self.folder / "target_answers", layers)

    @property
    def num_layers(self) -> int:
        """The target's decoder layers."""
        return int(self.loaded.config["text_config"]["num_hidden_layers"])

    def tapped(self, layers: tuple[int, ...]) -> MlxVlmTarget:
        """The target with these layers tapped; always the same one, as recordings are its own."""
        if layers not in self.targets:
            self.targets[layers] = TappedTarget(self.loaded.target, layers)
        return self.targets[layers]


def summary(row: Mapping[str, Any]) -> str:
    """One line of a row's results."""
    parts = [f"trained {row.get('train_seconds', 0)} s"]
    for name, result in row["results"].items():
        tau = sum(result["tokens"]) / sum(result["rounds"])
        parts.append(f"{name} {tau:.2f} ({result['draft_ms']} ms)")
    return "; ".join(parts)


if __name__ == "__main__":
    main()
