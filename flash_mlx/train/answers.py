"""What the target answers, and the examples that come of it.

The target is the best teacher of its own drafter, so by default it answers itself: greedily and at
temperature 1, with whatever drafter there is to make it faster (which changes no answer). Every
answer is a line of a JSONL file as soon as it is there, under a key made of all that it depends on:
a run that is stopped goes on where it was, and another run finds what it needs.

Pictures are not kept: a prompt remembers how to read its arrays again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from flash_mlx.decode import Drafter, NoDrafter, decode
from flash_mlx.files import append_line, appending
from flash_mlx.loading import Model
from flash_mlx.processing import Media, make_prompt
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.targets import LoadedTarget
from flash_mlx.train.data import Example
from flash_mlx.train.source import Found, Question, is_video
from flash_mlx.video import Video

RECENT = 8  # pictures whose arrays stay in memory


@dataclass(frozen=True)
class AnswerSettings:
    """How the target answers.

    Attributes:
        temperatures: One answer at each.
        max_tokens: Most tokens of an answer.
        seed: Of the random numbers.
    """

    temperatures: tuple[float, ...] = (0.0, 1.0)
    max_tokens: int = 256
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Asked:
    """A question as the target reads it.

    Attributes:
        question: What is asked.
        prompt: Its rows; arrays of pictures are read when they are needed.
        digest: SHA-256 of what is asked and of whom, pictures included.
    """

    question: Question
    prompt: Prompt
    digest: str


class Arrays(Mapping[str, mx.array]):
    """The processor's arrays of one question, read again whenever they are no longer at hand."""

    def __init__(self, names: Sequence[str], read: Callable[[], Mapping[str, mx.array]]) -> None:
        """Remember how to read arrays of these names."""
        self._names, self._read = tuple(names), read

    def __getitem__(self, name: str) -> mx.array:
        """Return an array, read now."""
        if name not in self._names:
            raise KeyError(name)
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        """Yield the names."""
        return iter(self._names)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._names)


class PromptMaker:
    """Turns questions into prompts whose pictures are read when they are needed."""

    def __init__(self, loaded: LoadedTarget, target_hash: str) -> None:
        """Start with nothing in memory.

        Args:
            loaded: Whose processor reads.
            target_hash: Which target that is.
        """
        self._loaded, self._target_hash = loaded, target_hash
        self._recent: OrderedDict[Question, Prompt] = OrderedDict()

    def ask_all(self, found: Found, progress: Callable[[], None] = lambda: None) -> list[Asked]:
        """Make the prompt of each question; what cannot be read is added to `found.skipped`."""
        asked, broken = [], {source for source, _ in found.skipped}
        for question in found.questions:
            try:
                if question.source not in broken:
                    asked.append(self._ask(question))
            except (ValueError, OSError) as error:
                broken.add(question.source)
                found.skipped.append((question.source, str(error)))
            progress()
        return asked

    def _ask(self, question: Question) -> Asked:
        prompt = self._read(question)
        lazy = Arrays(tuple(prompt.inputs), lambda: self._read(question, prompt.tokens).inputs)
        digest = hashlib.sha256(
            json.dumps([self._target_hash, question.text, question.system]).encode()
        )
        for file in question.images:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        return Asked(question, replace(prompt, inputs=lazy), digest.hexdigest())

    def _read(self, question: Question, expected: tuple[int, ...] | None = None) -> Prompt:
        if question not in self._recent:
            images: list[Media] = []
            for file in question.images:
                images.append(Video(file) if is_video(file) else file)
            self._recent[question] = make_prompt(
                self._loaded, question.text, images, system=question.system
            )
            if len(self._recent) > RECENT:
                self._recent.popitem(last=False)
        prompt = self._recent[question]
        if expected is not None and prompt.tokens != expected:
            raise ValueError(
                f"Pictures must not change while a drafter is trained on them; those of "
                f"{question.source} did."
            )
        return prompt


def token_ids(values: Iterable[object], vocab_size: int) -> tuple[int, ...]:
    """Return ids from a file, which must be checked: MLX reads out of bounds for any others.

    Raises:
        ValueError: If one is no whole number from 0 up to the vocabulary's size.
    """
    ids = []
    for each in values:
        if type(each) is not int or not 0 <= each < vocab_size:
            raise ValueError(f"its ids must be from 0 to {vocab_size - 1}; got {each!r:.40}")
        ids.append(each)
    return tuple(ids)


class AnswerFile:
    """Answers on the disk, one JSON object a line."""

    def __init__(self, file: Path, vocab_size: int) -> None:
        """Read what is there; a last line that was cut off is removed.

        Args:
            file: Made by the first answer.
            vocab_size: Of the target. A line that holds other ids counts as missing.

        Raises:
            OSError: If it cannot be read or written.
            ValueError: If it holds something else.
        """
        self._file = file
        self._answers: dict[str, tuple[int, ...]] = {}
        content = b""
        if file.is_file():
            with file.open("rb") as stream:
                fcntl.flock(stream, fcntl.LOCK_SH)  # else another run's line may be half there
                content = stream.read()
        whole = content[: content.rfind(b"\n") + 1]
        start = b'{"key": '
        rest = content[len(whole) :]
        if not all(
            each[: len(start)] == start[: len(each)] for each in (*whole.splitlines(), rest)
        ):
            raise ValueError(
                f"The file of answers must hold answers of this command; {file} holds something "
                "else. Name a new file."
            )
        for line in whole.splitlines():
            try:
                row = json.loads(line)
                self._answers[row["key"]] = token_ids(row["tokens"], vocab_size)
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        if whole != content:
            with appending(file):
                pass  # what is cut off is a half line alone, whatever was added meanwhile

    def get(self, key: str) -> tuple[int, ...] | None:
        """Return the tokens of an answer, if it is there."""
        return self._answers.get(key)

    def add(self, key: str, row: Mapping[str, object], tokens: tuple[int, ...]) -> None:
        """Append an answer, all of it or nothing, whatever other runs append.

        Raises:
            OSError: If it cannot be written.
        """
        line = json.dumps({"key": key, **row, "tokens": tokens}) + "\n"
        with appending(self._file) as descriptor:
            append_line(descriptor, line.encode("ascii"))
        self._answers[key] = tokens


def answer_all(
    model: Model,
    asked: Sequence[Asked],
    settings: AnswerSettings,
    file: AnswerFile,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Example]:
    """Let the target answer each question at each temperature.

    Args:
        model: The target, and a drafter that makes it faster.
        asked: The questions.
        settings: How to answer.
        file: Has the answers of earlier runs, and gets the new ones.
        progress: Told the number of tokens of each answer.

    Raises:
        OSError: If an answer cannot be written, or a picture has gone.
    """
    examples = []
    for one in asked:
        for temperature in settings.temperatures:
            what = [one.digest, temperature, settings.max_tokens, settings.seed]
            key = hashlib.sha256(json.dumps(what).encode()).hexdigest()
            tokens = file.get(key)
            if tokens is None:
                tokens = _answer(model, one.prompt, temperature, settings, int(key[:8], 16))
                row = {"source": one.question.source, "prompt": one.question.text}
                file.add(key, row | {"temperature": temperature}, tokens)
            examples.append(Example(one.prompt, tokens, one.digest))
            progress(len(tokens))
    return examples


def _answer(
    model: Model, prompt: Prompt, temperature: float, settings: AnswerSettings, seed: int
) -> tuple[int, ...]:
    drafter: Drafter[Any] = NoDrafter() if model.drafter is None else model.drafter
    rounds = decode(
        model.target,
        drafter,
        prompt,
        sampler=Sampler(temperature=temperature),
        key=mx.random.key(seed),
        max_tokens=settings.max_tokens,
        stop_ids=frozenset(model.loaded.eos_ids),
    )
    return tuple(token for each in rounds for token in each.tokens)


def given_answers(
    loaded: LoadedTarget, asked: Sequence[Asked], found: Found, max_tokens: int
) -> tuple[list[Example], int]:
    """Take the data set's own answers.

    Args:
        loaded: Whose tokenizer writes them.
        asked: The questions; those without an answer are added to `found.skipped`.
        found: Where they come from.
        max_tokens: Most tokens of an answer.

    Returns:
        The examples, and how many answers were cut off to fit in `max_tokens` or the context.
    """
    examples, cut = [], 0
    for one in asked:
        if one.question.answer is None:
            found.skipped.append((one.question.source, "it has no answer of its own"))
            continue
        words = loaded.processor.tokenizer.encode(one.question.answer, add_special_tokens=False)
        tokens = (*map(int, words), loaded.eos_ids[0])
        room = max_tokens
        if (context := loaded.target.max_context) is not None:
            room = min(room, context - len(one.prompt))
        if room < 2:
            found.skipped.append((one.question.source, "its prompt leaves no room for an answer"))
            continue
        cut += len(tokens) > room
        examples.append(Example(one.prompt, tokens[:room], one.digest))
    return examples, cut
