"""Drafters against plain decoding, in one process, on the same prompts.

For each prompt every contender answers once a repeat, in an order drawn anew each time, so that a
drift of the machine meets all of them and nobody always follows the same one. The plain baseline
stands beside `mlx_vlm.stream_generate` on the same model in memory, so that nobody need believe
that it is a good one.

Shapes:
    A: rows of an answer.    V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from flash_mlx.bench.answers import MLX_VLM, PLAIN, Answer, Settings, answer, clock
from flash_mlx.bench.figures import Asked, Sample, describe, figures
from flash_mlx.bench.pacing import record
from flash_mlx.bench.questions import Question
from flash_mlx.decode import Drafter, NoDrafter
from flash_mlx.draft.adaptive import belief_in, unpaced
from flash_mlx.draft.drafter import FlashDrafter
from flash_mlx.draft.stepwise import StepwiseDrafter
from flash_mlx.loading import num_latents
from flash_mlx.measure import first_difference, read_answer, total_entropy
from flash_mlx.processing import Detokenizer
from flash_mlx.prompt import Prompt
from flash_mlx.stats import Phases
from flash_mlx.targets import LoadedTarget

CLOCKED_PROMPTS = 5  # prompts that are answered once more to split a round's time into phases
NEXT_REPEAT = 1_000_003  # between the seeds of a prompt's repeats


def run(
    loaded: LoadedTarget,
    drafters: Mapping[str, Drafter[Any]],
    questions: Sequence[Prompt | Question],
    settings: Settings,
    progress: Callable[[int], None] = lambda _: None,
    skip: Callable[[Mapping[str, str]], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Let all contenders answer all questions.

    Plain decoding always runs, and mlx-vlm's own generation if greedy.

    Args:
        loaded: The target.
        drafters: Name to drafter.
        questions: What to answer; the first one that can be asked is also the warm-up, which is
            not counted.
        settings: How to measure.
        progress: Told of each turn done, the warm-up included.
        skip: Told the name of a question that cannot be asked, and why, as `{name: why}`.

    Returns:
        One row a contender, in the format of `bench --json`; the plain one first, with the entropy
        of the target's text and what was asked besides. A contender that fails has a row with
        `error` and no figures; if plain decoding fails, that is all of them.

    Raises:
        ValueError: If nothing can be asked, or no answer is long enough to be timed.
    """
    contest = _Contest(loaded, drafters, settings)
    why = "there was none."
    for number, question in enumerate(questions, start=1):
        if isinstance(question, Prompt):
            name, topic, turns = f"prompt {number}", "", [lambda _, prompt=question: prompt]
        else:
            name, topic = question.name, question.topic
            turns = [partial(question.prompt, loaded)] * len(question.turns)
        skipped = contest.converse(name, topic, turns, progress)
        skip(skipped)
        why = next(iter(skipped.values()), why)
    if not contest.warm:
        raise ValueError(f"A question at least must be one that can be asked; {why}")
    return contest.rows()


class _Contest:
    """Contenders, and what they made of the prompts so far."""

    def __init__(
        self, loaded: LoadedTarget, drafters: Mapping[str, Drafter[Any]], settings: Settings
    ) -> None:
        self.loaded, self.settings = loaded, settings
        self.contenders: dict[str, Drafter[Any] | None] = {PLAIN: NoDrafter(), **drafters}
        if settings.temperature == 0:
            self.contenders[MLX_VLM] = None
        self.warm = False
        self.errors: dict[str, str] = {}
        self.asked: list[Asked] = []
        self.samples: dict[str, list[Sample]] = {name: [] for name in self.contenders}
        self.divergences: dict[str, dict[str, Any]] = {}
        self.phases = {name: Phases() for name in self.contenders}
        self.recorded: dict[str, list[list[int]]] = {}
        self.latents = dict.fromkeys(self.contenders, 0)
        self._order = np.random.default_rng(settings.seed)
        self._bits, self._tokens = 0.0, 0

    def converse(
        self,
        name: str,
        topic: str,
        turns: Sequence[Callable[[list[str]], Prompt]],
        progress: Callable[[int], None],
    ) -> dict[str, str]:
        """Ask turn after turn; the first one ever is asked once more before, for nothing.

        Args:
            name: Of the question.
            topic: Its topic.
            turns: From plain decoding's answers so far to the next prompt.
            progress: Told of each turn done.

        Returns:
            The name of what cannot be asked -> why; empty if all could be.
        """
        said: list[str] = []
        for turn, make in enumerate(turns):
            if PLAIN in self.errors:
                break
            named = name if turn == 0 else f"{name}, turn {turn + 1}"
            try:
                prompt = make(said)
            except (ValueError, OSError) as error:
                progress(len(turns) - turn)
                return {named: str(error)}
            if not self.warm:
                self._answers(prompt, self.settings.seed)
                progress(1)
                self.warm = True
            said.append(self.ask(named, topic, prompt))
            progress(1)
        return {}

    def ask(self, name: str, topic: str, prompt: Prompt) -> str:
        """Let all answer, and keep the books.

        Returns:
            What plain decoding says; empty if it failed.
        """
        images, number = len(prompt.image_spans), len(self.asked)
        asked = Asked(name, topic, images, len(prompt), prompt.num_visual_tokens)
        seeds = [
            (self.settings.seed + number + repeat * NEXT_REPEAT) % 2**63
            for repeat in range(self.settings.repeats)
        ]
        rounds = [self._answers(prompt, seed) for seed in seeds]
        if PLAIN in self.errors:
            return ""
        self.asked.append(asked)
        for contender, drafter in self.contenders.items():
            self.latents[contender] += num_latents(drafter, prompt)
        plain = tuple(each[PLAIN] for each in rounds)
        for name in self._standing():
            sample = Sample(asked, tuple(each[name] for each in rounds), plain)
            self.samples[name].append(sample)
            if name not in self.divergences:
                self._note_divergence(name, prompt, sample)
        if number < CLOCKED_PROMPTS:
            self._clock(prompt, seeds[0])
            if self.settings.record and self.settings.temperature == 0:
                self._record(prompt, plain[0].tokens)
        self._bits += total_entropy(self.loaded.target, prompt, plain[0].tokens)
        self._tokens += len(plain[0].tokens)
        text = Detokenizer(self.loaded.processor)
        return text.add(plain[0].tokens) + text.finish()

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each contender."""
        rows = []
        for name in self.contenders:
            row: dict[str, Any] = {"drafter": name, "temperature": self.settings.temperature}
            row["error"] = self.errors.get(name, self.errors.get(PLAIN))
            if row["error"] is None:
                row |= figures(self.samples[name])
                row["latents"] = self.latents[name] / len(self.asked)
                row["first_divergence"] = self.divergences.get(name)
                row |= self.phases[name].per_round()
                if name in self.recorded:
                    drafter = unpaced(self.contenders[name])
                    row["recorded"], row["belief"] = self.recorded[name], belief_in(drafter)
                    row["block_size"] = None
                    if isinstance(drafter, FlashDrafter | StepwiseDrafter):
                        row["block_size"] = drafter.block_size
            if name == PLAIN and PLAIN not in self.errors:
                row["target_entropy"] = self._bits / self._tokens
                row["asked"] = describe(self.asked)
            rows.append(row)
        return rows

    def _standing(self) -> list[str]:
        return [name for name in self.contenders if name not in self.errors]

    def _answers(self, prompt: Prompt, seed: int) -> dict[str, Answer]:
        """Return the answer of each contender that has not failed, in an order drawn now."""
        answers: dict[str, Answer] = {}
        for name in self._order.permutation(self._standing()).tolist():
            drafter = self.contenders[name]
            with _noting(self.errors, name):
                answers[name] = answer(self.loaded, drafter, prompt, self.settings, seed)
        return answers

    def _clock(self, prompt: Prompt, seed: int) -> None:
        """Split the time of rounds; mlx-vlm's are its own affair."""
        for name in self._standing():
            drafter = self.contenders[name]
            if drafter is not None:
                phases = self.phases[name]
                with _noting(self.errors, name):
                    clock(self.loaded, drafter, prompt, self.settings, seed, phases)

    def _record(self, prompt: Prompt, said: Sequence[int]) -> None:
        """Keep how many drafts after each token of a greedy answer are right."""
        for name in self._standing():
            drafter = unpaced(self.contenders[name])
            if drafter is not None and name != PLAIN:
                with _noting(self.errors, name):
                    counts = record(self.loaded.target, drafter, prompt, said)
                    self.recorded.setdefault(name, []).append(counts)

    def _note_divergence(self, name: str, prompt: Prompt, sample: Sample) -> None:
        """Keep where ids first differ, and how close the target's logits of the two ids are."""
        pair = next(((a, b) for a, b in sample.pairs if a.tokens != b.tokens), None)
        if pair is None:
            return
        ours, plain = pair[0].tokens, pair[1].tokens
        place = first_difference(ours, plain)
        found: dict[str, Any] = {"prompt": len(self.asked) - 1, "position": place}
        found |= {"tokens": [], "logit_gap": None}
        if place < min(len(ours), len(plain)):
            ids = [ours[place], plain[place]]
            logits = read_answer(self.loaded.target, prompt, plain).logits[place]
            found |= {"tokens": ids, "logit_gap": (logits[ids[0]] - logits[ids[1]]).abs().item()}
        self.divergences[name] = found


@contextmanager
def _noting(errors: dict[str, str], name: str) -> Iterator[None]:
    """Write down what a contender fails with, and go on: the others' figures stand."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  a drafter may fail with anything
        errors[name] = f"{type(error).__name__}: {error}"
