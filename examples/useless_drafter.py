"""Write drafters of the demo that have learned nothing: what decoding with them costs is the worst.

    python examples/useless_drafter.py --output useless

writes two folders into it, `unknown` and `believed`, with the same random weights. The second says
in its config.json what the bundled drafter's training measured: that its drafts are good.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import flash_mlx  # noqa: F401  (binds a fast BLAS before MLX is imported)
import mlx.core as mx

from flash_mlx.checkpoint import load_model, save_drafter
from flash_mlx.draft import FlashModel
from flash_mlx.loading import DEMO
from flash_mlx.pace import PRIOR


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    folder = parser.parse_args().output
    config = load_model(DEMO / "drafter").config
    for name, belief in (("unknown", PRIOR), ("believed", config.expected_acceptance)):
        mx.random.seed(3)
        model = FlashModel(replace(config, expected_acceptance=belief))
        save_drafter(model, folder / name, {})


if __name__ == "__main__":
    main()
