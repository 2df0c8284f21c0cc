"""What a trained drafter is worth: it drafts for the target on held-out scenes, in the real loop.

At temperature 0 the target's text is known beforehand, so its passes are looked up (`replay`) and
many scenes can be asked; at temperature 1 the target really answers. Drafts are clocked. What is
reported of time is the bound that follows, tau / (C + draft): tau tokens a round, C what a
verification costs in plain passes (`verify_costs`), draft what the drafts cost in the same unit.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flash_mlx  # noqa: F401  (binds a fast BLAS before MLX is imported)
import mlx.core as mx

from flash_mlx.decode import Drafter, Target, decode
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.stats import GenerationStats, Phases, clocked
from flash_mlx.targets import LoadedTarget
from flash_mlx.tree import DraftTree, Topology
from replay import ReplayTarget, record, states
from study_data import FAMILIES, held_out_prompts

MAX_TOKENS = 160
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 17, 25, 33)


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Prompts about held-out scenes, and what the target answers.

    Attributes:
        loaded: The target.
        prompts: By family.
        answers: Greedy ones, likewise.
        sampled: How many prompts of a family are asked at temperature 1 too.
        recordings: By target and family; made when they are first needed.
    """

    loaded: LoadedTarget
    prompts: Mapping[str, Sequence[Prompt]]
    answers: Mapping[str, Sequence[Sequence[int]]]
    sampled: int
    recordings: dict[tuple[Target, str], list[ReplayTarget]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        loaded: LoadedTarget,
        folder: Path,
        count: int,
        sampled: int,
        *,
        tuning: bool = False,
        clips: bool = False,
    ) -> HeldOut:
        """Draw prompts; the target answers them once, then the file in the folder does."""
        prompts = {
            family: held_out_prompts(loaded, family, count, tuning=tuning, clips=clips)
            for family in FAMILIES
        }
        file = folder / f"{'tuning' if tuning else 'held_out'}_{count}.json"
        if not file.exists():
            file.write_text(
                json.dumps(
                    {
                        family: [
                            record(loaded.target, prompt, MAX_TOKENS, loaded.eos_ids)
                            for prompt in asked
                        ]
                        for family, asked in prompts.items()
                    }
                )
            )
        return cls(loaded, prompts, json.loads(file.read_text()), sampled)

    def measure(
        self, target: Target, drafter: Drafter[Any], *, sampled: bool = True
    ) -> dict[str, dict[str, Any]]:
        """Let the drafter draft for all prompts.

        Args:
            target: With the taps that the drafter reads.
            drafter: Drafts.
            sampled: Whether temperature 1 is tried too.

        Returns:
            By "family t=temperature": `tokens` and `rounds` of each prompt, the share of rounds
            that accept each slot, and `draft_ms` of a round (median over prompts).
        """
        results: dict[str, dict[str, Any]] = {}
        for family, asked in self.prompts.items():
            if (target, family) not in self.recordings:
                self.recordings[target, family] = [
                    ReplayTarget(target, states(target, prompt, answer))
                    for prompt, answer in zip(asked, self.answers[family], strict=True)
                ]
            known = self.recordings[target, family]
            for temperature in (0.0, 1.0) if sampled and self.sampled else (0.0,):
                greedy = temperature == 0
                prompts = asked if greedy else asked[: self.sampled]
                stats = [
                    self._answer(known[i] if greedy else target, drafter, prompt, temperature, i)
                    for i, prompt in enumerate(prompts)
                ]
                results[f"{family} t={temperature:g}"] = _summed(stats)
        return results

    def _answer(
        self,
        target: Target,
        drafter: Drafter[Any],
        prompt: Prompt,
        temperature: float,
        number: int,
    ) -> GenerationStats:
        phases = Phases()
        stats = GenerationStats(phases=phases)
        target, timed = clocked(target, drafter, phases)
        rounds = decode(
            target,
            timed,
            prompt,
            sampler=Sampler(temperature=temperature),
            key=mx.random.key(number),
            max_tokens=MAX_TOKENS,
            stop_ids=frozenset(self.loaded.eos_ids),
        )
        for _ in stats.watch(rounds):
            pass
        return stats


def verify_costs(loaded: LoadedTarget, prompt: Prompt, repeats: int = 15) -> dict[int, float]:
    """Return the milliseconds of a pass over so many rows: the median, widths in turn."""
    target = loaded.target
    cache = target.make_cache()
    mx.eval(target.prefill(prompt, cache).hidden)
    times: dict[int, list[float]] = {width: [] for width in WIDTHS}
    for _ in range(repeats):
        for width, found in times.items():
            tree = DraftTree(Topology.chain(width - 1), mx.full((width,), 100, dtype=mx.int32))
            start = time.perf_counter()
            out = target.verify(tree, cache)
            mx.eval(out.logits, out.hidden)
            found.append(1000 * (time.perf_counter() - start))
    return {width: round(statistics.median(found), 3) for width, found in times.items()}


def _summed(stats: Sequence[GenerationStats]) -> dict[str, Any]:
    together = GenerationStats()
    for each in stats:
        together.outcomes.update(each.outcomes)
    times = [each.phases.per_round()["draft_seconds"] for each in stats]
    known = [1000 * seconds for seconds in times if seconds is not None]
    return {
        "tokens": [each.generation_tokens - 1 for each in stats],
        "rounds": [each.rounds for each in stats],
        "by_position": [round(share, 4) for share in together.acceptance_by_position],
        "draft_ms": round(statistics.median(known), 3) if known else None,
    }
