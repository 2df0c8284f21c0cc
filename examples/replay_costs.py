"""How much would be drafted, and what would it bring, where rounds cost what they cost on Macs?

    python replay_costs.py --limit 4

A target answers about pictures, plainly and greedily, and its drafter's drafts after each token are
recorded once. Then `pace.Pace` is run over the recordings, in order, at published costs of 4-bit
weights by rows (`flash_mlx.bench.macs`): projected, for nothing here ran on a Mac. A useless
drafter, none of whose drafts is ever right, is paced too, also as if its training had said that it
is good. "Sampled" texts know nothing of each other.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter

from flash_mlx import load
from flash_mlx.bench.macs import CURVES
from flash_mlx.bench.pacing import overall, record, replay
from flash_mlx.cost import Costs
from flash_mlx.decode import NoDrafter
from flash_mlx.draft.adaptive import belief_in
from flash_mlx.draft.drafter import FlashDrafter
from flash_mlx.draft.stepwise import StepwiseDrafter
from flash_mlx.loading import demo_pictures
from flash_mlx.pace import PRIOR
from flash_mlx.processing import make_prompt
from flash_mlx.verify import greedy_text

PROMPT = "Describe the image in detail."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--draft-model", default="auto")
    parser.add_argument("--image", nargs="+", help="pictures; default: the bundled ones")
    parser.add_argument("--limit", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument(
        "--draft-cost",
        type=float,
        nargs=2,
        default=(0.1, 0.15),
        metavar=("ONE", "ALL"),
        help="of drafting one token and a whole block, in plain tokens",
    )
    args = parser.parse_args()
    model = load(args.model, args.draft_model, drafting="fixed")
    drafter = model.drafter
    if not isinstance(drafter, FlashDrafter | StepwiseDrafter):
        parser.error("--draft-model must have weights.")
    good = []
    for file in (args.image or list(map(str, demo_pictures())))[: args.limit]:
        prompt = make_prompt(model.loaded, PROMPT, [file])
        stop_ids = model.loaded.eos_ids
        text = greedy_text(model.target, NoDrafter(), prompt, args.max_tokens, stop_ids).tokens
        good.append(record(model.target, drafter, prompt, text))
    useless = [[0] * len(text) for text in good]
    block_size = drafter.block_size
    depths_and_costs = tuple(zip((1, max(2, block_size)), args.draft_cost, strict=True))
    known = max(PRIOR, belief_in(drafter))
    right = statistics.mean(count for text in good for count in text)
    print(
        f"{len(good)} texts of {model.name}, drafter {model.draft_name}; of {block_size} drafts "
        f"after a token {right:.2f} are right"
    )
    print(f"{'costs of':22}{'drafter':18}{'all':>6}{'worst':>7}  drafts of a round: share")
    for curve in CURVES:
        plain, rounds = curve.times[0][1], curve.times
        drafts = tuple((depth, cost * plain) for depth, cost in depths_and_costs)
        costs = Costs(plain, rounds, drafts)
        for name, texts, belief, greedy in (
            ("recorded", good, known, True),
            ("useless", useless, PRIOR, True),
            ("useless, believed", useless, known, True),
            ("useless, sampled", useless, PRIOR, False),
            ("believed, sampled", useless, known, False),
        ):
            results = replay(texts, costs, block_size, belief, greedy=greedy)
            depths = Counter(depth for each in results for depth in each.depths)
            shares = ", ".join(
                f"{depth}: {count / depths.total():.0%}" for depth, count in depths.most_common(4)
            )
            print(
                f"{curve.name:22}{name:18}{overall(results):6.3f}"
                f"{min(each.speedup for each in results):7.3f}  {shares}"
            )


if __name__ == "__main__":
    main()
