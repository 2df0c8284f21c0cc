"""How a drafter's cost grows: with visual tokens, prompt, answer, block size and width.

    OPENBLAS_NUM_THREADS=1 python cost_growth.py [--json OUT] [--plot OUT.png] [--repeats N]

Two drafters with random weights, of the same width, on the same rows: FLASH, which keeps a picture
as 16 latents, and MSD, which keeps all of its rows. Timed is a round's drafting: one accepted row
is read, then four tokens are drafted. Beside them stands a pass of the demo's target over five rows
with as much in its cache. Prefill is what reading the prompt takes a drafter.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flash_mlx.bench.table import aligned, as_markdown
from flash_mlx.decode import Drafter, ReadingDrafter
from flash_mlx.draft import FlashConfig, FlashModel
from flash_mlx.draft.decoder import DecoderConfig, Past
from flash_mlx.draft.drafter import FlashDrafter
from flash_mlx.draft.msd import MsdModel
from flash_mlx.draft.stepwise import StepwiseDrafter, StepwiseState
from flash_mlx.loading import DEMO
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.targets import load_target
from flash_mlx.targets.scratch import scratch_cache
from flash_mlx.timing import seconds_in_turns
from flash_mlx.tree import DraftTree, Topology
import mlx.core as mx

VOCABULARY, LATENTS, HEAD = 2048, 16, 64
TEXT = 32  # rows of text after the picture
USUAL = {
    "visual tokens": 1024,
    "prompt tokens": 64,
    "answer tokens": 0,
    "block size": 4,
    "width": 256,
}
SWEEPS = {
    "visual tokens": (64, 256, 1024, 4096, 16384),
    "prompt tokens": (64, 512, 2048, 8192),
    "answer tokens": (64, 512, 2048, 8192),
    "block size": (2, 4, 6, 8, 10),
    "width": (128, 256, 512, 1024),
}
PIECE = 512  # rows of a prompt that are read at once
GREEDY, KEY = Sampler(), mx.random.key(0)


class Case:
    """Two drafters and a prompt of given sizes."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes
        width, block = sizes["width"], sizes["block size"]
        table = mx.random.normal((VOCABULARY, width), scale=0.1)
        flash = FlashModel(
            FlashConfig(width, VOCABULARY, block, LATENTS, num_heads=width // HEAD, head_dim=HEAD)
        )
        msd = MsdModel(
            DecoderConfig(
                width,
                VOCABULARY,
                intermediate_size=4 * width,
                num_heads=width // HEAD,
                num_kv_heads=width // HEAD,
                head_dim=HEAD,
                block_size=block,
            )
        )
        mx.eval(table, flash.parameters(), msd.parameters())

        def embed(tokens: mx.array) -> mx.array:
            return table[tokens]

        def lm_head(hidden: mx.array) -> mx.array:
            return hidden @ table.T

        self.flash = FlashDrafter(flash, embed, lm_head)
        self.msd = StepwiseDrafter(msd, embed, lm_head, VOCABULARY)
        visual, text = sizes["visual tokens"], sizes["prompt tokens"]
        self.prompt = Prompt((1,) * (1 + visual + text), ((1, 1 + visual),))
        self.num_rows = len(self.prompt) + sizes["answer tokens"]

    def rows(self, count: int, parts: int) -> mx.array:
        """Return what a drafter reads of the target; MSD reads embeddings besides."""
        return mx.random.normal((count, parts * self.sizes["width"]), key=KEY)

    def flash_state(self) -> Any:
        state = self.flash.prefill(self.prompt, self.rows(len(self.prompt), 1), 1)
        answer = self.sizes["answer tokens"]
        if answer:
            state = self.flash.extend(self.rows(answer, 1), (1,) * answer, state)
        return state

    def msd_state(self) -> StepwiseState:
        """Return a state whose rows are zeros: their number alone is what passes cost."""
        config = self.msd.model.config
        shape = (1, config.num_kv_heads, self.num_rows, config.head_dim)
        past = Past(mx.zeros(shape), mx.zeros(shape), self.num_rows)
        output, waiting = mx.zeros((1, config.hidden_size)), mx.zeros((0, 2 * config.hidden_size))
        return StepwiseState(past, self.num_rows, output, None, waiting)

    def passes(self) -> dict[str, Callable[[], mx.array]]:
        """Return what drafts a round; states go on from round to round, as they do in the loop."""

        def run(drafter: Drafter[Any], state: Any, parts: int) -> Callable[[], mx.array]:
            states, hidden = [state], self.rows(1, parts)

            def one() -> mx.array:
                states.append(drafter.extend(hidden, (1,), states.pop()))
                return drafter.draft(1, states[0], GREEDY, KEY).tokens

            return one

        return {
            "FLASH": run(self.flash, self.flash_state(), 1),
            "MSD": run(self.msd, self.msd_state(), 2),
        }

    def memory(self) -> dict[str, float]:
        """Return keys and values of all rows that are kept [MB]."""
        flash, msd = self.flash_state(), self.msd_state()
        row = 2 * 4 * self.sizes["width"] / 1e6
        return {"FLASH": flash.length * row, "MSD": msd.past.length * row}

    def prefill(self) -> dict[str, float]:
        """Return the time to read the prompt, in pieces as the target reads it [s]."""

        def timed(drafter: ReadingDrafter[Any], parts: int) -> float:
            hidden = self.rows(len(self.prompt), parts)
            mx.eval(hidden)
            start, state = time.perf_counter(), None
            for first in range(0, len(self.prompt), PIECE):
                state = drafter.read(self.prompt, first, hidden[first : first + PIECE], state)
            state = drafter.extend(hidden[-1:], (1,), state)
            mx.eval(drafter.draft(1, state, GREEDY, KEY).tokens)
            return time.perf_counter() - start

        return {"FLASH": timed(self.flash, 1), "MSD": timed(self.msd, 2)}


def target_seconds(lengths: list[int], repeats: int) -> dict[int, float]:
    """Return the time of the demo's pass over five rows, by rows in its cache [s]."""
    target = load_target(DEMO / "target").target
    caches = {length: scratch_cache(target, length) for length in lengths}
    tree = DraftTree(Topology.chain(4), mx.ones((5,), dtype=mx.int32))

    def one(length: int) -> Callable[[], mx.array]:
        return lambda: target.verify(tree, caches[length]).logits

    return seconds_in_turns({length: one(length) for length in lengths}, repeats)


def sweep(name: str, repeats: int) -> list[dict[str, Any]]:
    cases = {value: Case(USUAL | {name: value}) for value in SWEEPS[name]}
    passes = {value: case.passes() for value, case in cases.items()}
    seconds = {
        kind: seconds_in_turns({value: each[kind] for value, each in passes.items()}, repeats)
        for kind in ("FLASH", "MSD")
    }
    rows = []
    for value, case in cases.items():
        row: dict[str, Any] = {"sweep": name, "value": value, **case.sizes}
        row["draft_ms"] = {kind: 1e3 * times[value] for kind, times in seconds.items()}
        if name in ("visual tokens", "prompt tokens"):
            row["prefill_ms"] = {k: 1e3 * s for k, s in case.prefill().items()}
        row["memory_mb"] = case.memory()
        rows.append(row)
    if name in ("visual tokens", "prompt tokens", "answer tokens"):
        lengths = {value: case.num_rows for value, case in cases.items()}
        target = target_seconds(sorted(set(lengths.values())), repeats)
        for row in rows:
            row["target_ms"] = 1e3 * target[lengths[row["value"]]]
    return rows


def cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    table = [["what grows", "to", "FLASH ms", "MSD ms", "target ms"]]
    table[0] += ["FLASH prefill ms", "MSD prefill ms", "FLASH MB", "MSD MB"]
    for row in rows:
        prefill = row.get("prefill_ms", {})
        table.append(
            [
                row["sweep"],
                str(row["value"]),
                number(row["draft_ms"]["FLASH"]),
                number(row["draft_ms"]["MSD"]),
                number(row.get("target_ms")),
                number(prefill.get("FLASH")),
                number(prefill.get("MSD")),
                number(row["memory_mb"]["FLASH"]),
                number(row["memory_mb"]["MSD"]),
            ]
        )
    return table


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["sweep"] for row in rows))
    figure = Figure(figsize=(3.4 * len(names), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        some = [row for row in rows if row["sweep"] == name]
        values = [row["value"] for row in some]
        for kind, style in (("FLASH", "o-"), ("MSD", "s--")):
            axes.plot(values, [row["draft_ms"][kind] for row in some], style, label=kind)
        if "target_ms" in some[0]:
            axes.plot(values, [row["target_ms"] for row in some], "k:", label="target, 5 rows")
        axes.set(xlabel=name, ylabel="ms a round", yscale="log")
        if name != "block size":
            axes.set_xscale("log", base=2)
        axes.legend(fontsize=7)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    mx.random.seed(0)
    rows = [row for name in args.sweeps for row in sweep(name, args.repeats)]
    print("\n".join((as_markdown if args.markdown else aligned)(cells(rows))))
    if args.json is not None:
        report = {"processor": str(mx.device_info().get("device_name")), "rows": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.plot is not None:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
