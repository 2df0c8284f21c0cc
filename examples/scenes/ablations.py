r"""What each choice of the training recipe is worth: runs variants, prints a table.

    python make_pictures.py --output pictures --count 400
    python ablations.py --data pictures --output runs/ablations --iters 400 --seeds 3 \\
        --only losses rollout

All runs share the target's answers. Acceptance is measured by decoding on held-out pictures, so
the numbers do not depend on what else the machine does; times are not compared. A run that is
there already is not repeated. Whether a drafter that was trained on one family of prompts helps on
another is said by

    flash-mlx train --data pictures --output runs/captions --prompt "Describe the image in detail."
    flash-mlx bench --data held-out --draft-model runs/captions \\
        --prompt "How many shapes are there?" "Name the shapes, and nothing else."
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from pathlib import Path

GROUPS: dict[str, dict[str, list[str]]] = {
    "losses": {
        "ours": [],
        "ours without SmoothL1": ["losses.hidden=0"],
        "log acceptance": ["losses.distribution=0", "losses.acceptance=1"],
        "KL and log acceptance": ["losses.acceptance=1"],
        "LK hybrid": ["losses.distribution=0", "losses.hybrid=1"],
        "argmax": ["losses.distribution=0", "losses.argmax=1"],
        "with ListMLE": ["losses.ranking=0.1"],
        "no slot decay": ["losses.slot_decay=1"],
        "until fail": ["losses.until_fail=true"],
        "noise 0.1": ["hidden_noise=0.1"],
    },
    "presets": {name: [f"--preset {name}"] for name in ("flash", "vispec")},
    "rollout": {f"{n + 1} blocks": [f"rollout={n}"] for n in (0, 1, 2)},
    "latents": {f"{n} latents": [f"drafter.num_latents={n}"] for n in (1, 4, 8, 16, 64)},
    "blocks": {f"k = {n}": [f"drafter.block_size={n}"] for n in range(2, 9)},
    "start": {name: [f"--init {name}"] for name in ("random", "last-layer", "embeddings")},
    "optimizer": {name: [f"optimizer={name}"] for name in ("muon", "adamw")},
}


def train(args: argparse.Namespace, output: Path, changes: list[str], seed: int) -> None:
    settings = [word for word in changes if not word.startswith("--")]
    words = ["flash-mlx", "train", "--data", str(args.data), "--output", str(output)]
    words += ["--model", args.model, "--iters", str(args.iters), "--save-every", "100", "--resume"]
    words += ["--batch-size", str(args.batch_size), "--set", f"seed={seed}", *settings]
    words += ["--answer-cache", str(args.output / "answers.jsonl"), "--no-bench"]
    for change in changes:
        if change.startswith("--"):
            words += change.split()
    subprocess.run(words, check=True)  # noqa: S603


def acceptance(output: Path) -> float:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return max(row["mean_acceptance_length"] for row in rows if row["kind"] == "validation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--iters", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=GROUPS, default=list(GROUPS))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    print("| group | variant | mean acceptance length | spread |\n| --- | --- | --- | --- |")
    for group in args.only:
        for name, changes in GROUPS[group].items():
            lengths = []
            for seed in range(args.seeds):
                output = args.output / f"{group}-{name}-{seed}".replace(" ", "-").replace("=", "")
                if not (output / "README.md").is_file():
                    train(args, output, changes, seed)
                lengths.append(acceptance(output))
            mean, spread = statistics.mean(lengths), max(lengths) - min(lengths)
            print(f"| {group} | {name} | {mean:.2f} | {spread:.2f} |", flush=True)


if __name__ == "__main__":
    main()
