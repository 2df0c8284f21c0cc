"""The real loop, driven by texts that a model said once, instead of by the model.

At temperature 0 a draft is accepted where it is what the model said; so recorded texts, with the
real tokenizer, tell how often a drafter that needs no hidden states (`ngram`) would have been right
about models that do not run here. The laws are one-hot, so nothing is left to chance.

Shapes:
    T: prompt rows.    A: tokens of the answer.    N: rows of a tree.    V: vocabulary.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from flash_mlx.bench.answers import Answer
from flash_mlx.bench.figures import counts
from flash_mlx.decode import Cache, Drafter, Output, Take, decode
from flash_mlx.files import read_json
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.stats import GenerationStats
from flash_mlx.tree import DraftTree

ALL = "all"


@dataclass(frozen=True)
class Turn:
    """A recorded turn.

    Attributes:
        topic: Of its question.
        prompt: What stood before the answer; a picture is one row.
        answer: [A] ids, the stop token included.
        vocab_size: V, of the model that said it.
    """

    topic: str
    prompt: Prompt
    answer: tuple[int, ...]
    vocab_size: int


class ReplayCache:
    """Rows that were read; see `decode.Cache`."""

    def __init__(self) -> None:
        """Hold nothing."""
        self._length = 0

    @property
    def length(self) -> int:
        """Rows committed."""
        return self._length

    def commit(self, rows: Sequence[int]) -> None:
        """Count these rows."""
        self._length += len(rows)


class ReplayTarget:
    """Says what was recorded, whatever it reads; implements `decode.Target`.

    A row's law is about the place after it, so it is right for rows on the recorded path. Others
    are never accepted, for the row before the first wrong one rejects it.

    Args:
        turn: What to say, and to what.
    """

    hidden_size = 1
    max_context: int | None = None

    def __init__(self, turn: Turn) -> None:
        """Keep the recording."""
        self.turn = turn
        self.vocab_size = turn.vocab_size

    def make_cache(self) -> ReplayCache:
        """Return the cache of a new sequence."""
        return ReplayCache()

    def prefill(self, prompt: Prompt, cache: Cache, take: Take | None = None) -> Output:
        """Read the prompt; see `Target`."""
        cache.commit(range(len(prompt)))
        hidden = mx.zeros((len(prompt), self.hidden_size))
        if take is not None:
            take(0, hidden)
            hidden = hidden[-1:]
        return Output(self._laws([0]), hidden)

    def verify(self, tree: DraftTree, cache: Cache) -> Output:
        """Read a tree; see `Target`."""
        done = 1 + cache.length - len(self.turn.prompt)
        laws = self._laws([done + depth for depth in tree.topology.depth])
        return Output(laws, mx.zeros((len(tree), self.hidden_size)))

    def embed(self, tokens: mx.array) -> mx.array:
        """Return [R, 1] zeros."""
        return mx.zeros((tokens.shape[0], self.hidden_size))

    def lm_head(self, hidden: mx.array) -> mx.array:  # noqa: ARG002
        """Refuse: recorded texts have no hidden states.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "Recorded texts are drafted from their ids alone (ngram); they have no hidden states."
        )

    def _laws(self, places: Sequence[int]) -> mx.array:
        """Return logits [N, V] that allow but the token at each place of the answer."""
        answer = self.turn.answer
        ids = mx.array([answer[min(place, len(answer) - 1)] for place in places])
        return mx.where(mx.arange(self.vocab_size) == ids[:, None], 0.0, -mx.inf)


def replay(turn: Turn, drafter: Drafter[Any]) -> Answer:
    """Let the loop say a turn again.

    Raises:
        RuntimeError: If it says anything else, which would be a bug of the loop.
    """
    stats = GenerationStats()
    rounds = decode(
        ReplayTarget(turn),
        drafter,
        turn.prompt,
        sampler=Sampler(),
        key=mx.random.key(0),
        max_tokens=len(turn.answer),
        stop_ids=(),
    )
    tokens = tuple(token for each in stats.watch(rounds) for token in each.tokens)
    if tokens != turn.answer:
        raise RuntimeError("The loop must say what was recorded, and it does not.")
    return Answer(tokens, stats.prefill_seconds, stats.decode_seconds, stats, 0.0)


def by_topic(turns: Sequence[Turn], make: Callable[[], Drafter[Any]]) -> dict[str, dict[str, Any]]:
    """Return what is accepted of a drafter's drafts, in all and by topic; see `figures.counts`.

    Args:
        turns: Recorded.
        make: Returns the drafter of a text.
    """
    answers: defaultdict[str, list[Answer]] = defaultdict(list)
    for turn in turns:
        answer = replay(turn, make())
        for topic in (ALL, turn.topic):
            answers[topic].append(answer)
    return {topic: counts(each) for topic, each in answers.items()}


def read_turns(questions: Path, answers: Path, folder: Path) -> Iterator[Turn]:
    """Yield all recorded turns; earlier ones of a conversation belong to the prompt.

    Args:
        questions: Rows in MMSpec's format.
        answers: What a model said, in that benchmark's format.
        folder: The model's `config.json`, tokenizer and `chat_template.json`.

    Raises:
        OSError: If a file is missing.
        ValueError: If one is not in its format.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    template = read_json(folder / "chat_template.json")["chat_template"]
    config: dict[str, Any] = read_json(folder / "config.json")
    image = config.get("image_token_index", config.get("image_token_id"))
    # Files name it here or there, and tokenizers may know more ids than `vocab_size` says.
    text = config.get("text_config", {})
    vocab_size = max(config.get("vocab_size", 0), text.get("vocab_size", 0), len(tokenizer))
    asked = {row["id"]: row for row in _rows(questions)}
    for row in _rows(answers):
        messages: list[dict[str, Any]] = []
        turns = zip(asked[row["question_id"]]["turns"], row["choices"][0]["turns"], strict=True)
        for question, said in turns:
            content = [{"type": "text", "text": question}]
            if not messages:
                content.insert(0, {"type": "image"})
            messages.append({"role": "user", "content": content})
            written = tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(written)["input_ids"]
            spans = tuple((i, i + 1) for i, token in enumerate(ids) if token == image)
            answer = (
                *tokenizer(said, add_special_tokens=False)["input_ids"],
                tokenizer.eos_token_id,
            )
            yield Turn(row["topic"], Prompt(tuple(ids), spans), answer, vocab_size)
            said_by = {"role": "assistant", "content": [{"type": "text", "text": said}]}
            messages.append(said_by)


def _rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
