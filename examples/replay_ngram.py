"""How many drafts would have been accepted? Lookup rules replayed over a model's recorded answers.

    python replay_ngram.py --questions mmspec.jsonl --answers baseline-LLaVA-1.5-7B.jsonl \
        --tokenizer llava-1.5-7b-hf

No model is run: at temperature 0 a draft is accepted where it is what the model said. The files are
those of the MMSpec benchmark; the tokenizer's folder holds `config.json` and `chat_template.json`,
too. Each line is a rule: its drafts per pass; how much faster than plain decoding it would be if a
draft cost a share `--row-cost` of a pass; its accepted drafts per pass, in all and by topic.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from flash_mlx.draft.ngram import BREAK, NgramRule, Text

ALL = "all"


class Lookup(Protocol):
    """A growing text that knows what followed an earlier place like its end."""

    def append(self, token: int) -> None: ...

    def continuation(self, limit: int) -> tuple[int, ...]: ...


class SuffixAutomaton:
    """Every factor of a text, at constant amortised cost a token (Blumer et al. 1985).

    A match is the longest suffix that occurred before, however long. That is the link of the newest
    state: a state's factors end at the same places, and its link's at more places.
    """

    def __init__(self, min_length: int, latest: bool) -> None:
        self.min_length, self.latest = min_length, latest
        self.text: list[int] = []
        self.edges: list[dict[int, int]] = [{}]
        self.link, self.length, self.end = [-1], [0], [0]  # of each state; state 0 is the empty one
        self.newest = self.matched = self.place = 0

    def append(self, token: int) -> None:
        self.text.append(token)
        if token == BREAK:
            self.newest = self.matched = 0
            return
        state = self.newest
        if token in self.edges[state]:  # an image is behind us, and this text has begun before
            self.newest = match = self._longest(state, token)
        else:
            self.newest = self._add_state({}, self.length[state] + 1, 0, len(self.text))
            while state != -1 and token not in self.edges[state]:
                self.edges[state][token] = self.newest
                state = self.link[state]
            match = 0 if state == -1 else self._longest(state, token)
            self.link[self.newest] = match
        self.matched, self.place = self.length[match], self.end[match]
        while self.latest and match > 0:
            self.end[match] = len(self.text)
            match = self.link[match]

    def continuation(self, limit: int) -> tuple[int, ...]:
        if self.matched < self.min_length:
            return ()
        following = self.text[self.place : self.place + limit]
        return tuple(following[: following.index(BREAK)] if BREAK in following else following)

    def _longest(self, state: int, token: int) -> int:
        """The state whose longest factor is that of `state` and the token; split off if need be."""
        follower = self.edges[state][token]
        length = self.length[state] + 1
        if self.length[follower] == length:
            return follower
        edges, link, end = self.edges[follower], self.link[follower], self.end[follower]
        copy = self._add_state(dict(edges), length, link, end)
        while state != -1 and self.edges[state].get(token) == follower:
            self.edges[state][token] = copy
            state = self.link[state]
        self.link[follower] = copy
        return copy

    def _add_state(self, edges: dict[int, int], length: int, link: int, end: int) -> int:
        self.edges.append(edges)
        self.length.append(length)
        self.link.append(link)
        self.end.append(end)
        return len(self.length) - 1


def ngrams(min_n: int, max_n: int, occurrence: Any, per_match: int | None) -> Callable[[], Text]:
    return partial(Text, NgramRule(min_n, max_n, occurrence, per_match))


RULES: dict[str, tuple[Callable[[], Lookup], int]] = {  # name -> lookup, most drafts of a pass
    "2-3 earliest": (ngrams(2, 3, "earliest", None), 10),
    "2-3 latest": (ngrams(2, 3, "latest", None), 10),
    "automaton 2+ earliest": (partial(SuffixAutomaton, 2, latest=False), 10),
    "automaton 2+ latest": (partial(SuffixAutomaton, 2, latest=True), 10),
    "1-3 earliest": (ngrams(1, 3, "earliest", None), 10),
    "1-3 latest": (ngrams(1, 3, "latest", None), 10),
    "automaton 1+ earliest": (partial(SuffixAutomaton, 1, latest=False), 10),
    "automaton 1+ latest": (partial(SuffixAutomaton, 1, latest=True), 10),
    "1-4 latest, 2 a match": (ngrams(1, 4, "latest", 2), 8),
}


@dataclass(frozen=True)
class Turn:
    """A recorded turn: what stood before the answer, image rows as one break, and the answer."""

    topic: str
    prompt: list[int]
    answer: list[int]


@dataclass
class Count:
    passes: int = 0
    drafted: int = 0
    accepted: int = 0


def read_turns(questions: Path, answers: Path, tokenizer_folder: Path) -> Iterator[Turn]:
    """Yield all turns; earlier ones of a conversation belong to the prompt."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    template = read_json(tokenizer_folder / "chat_template.json")["chat_template"]
    config = read_json(tokenizer_folder / "config.json")
    image = config.get("image_token_index", config.get("image_token_id"))
    asked = {row["id"]: row for row in read_lines(questions)}
    for row in read_lines(answers):
        messages: list[dict[str, Any]] = []
        turns = zip(asked[row["question_id"]]["turns"], row["choices"][0]["turns"], strict=True)
        for question, answer in turns:
            content = [{"type": "text", "text": question}]
            if not messages:
                content.insert(0, {"type": "image"})
            messages.append({"role": "user", "content": content})
            text = tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
            prompt = [BREAK if token == image else token for token in tokenizer(text)["input_ids"]]
            said = tokenizer(answer, add_special_tokens=False)["input_ids"]
            yield Turn(row["topic"], prompt, said)
            said_by = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
            messages.append(said_by)


def replay(turn: Turn, lookup: Lookup, num_drafts: int) -> Count:
    """Count what the rule drafts and what of it the answer says."""
    count = Count()
    for token in (*turn.prompt, *turn.answer[:1]):
        lookup.append(token)
    done = 1
    while done < len(turn.answer):
        rest = turn.answer[done:]
        drafts = lookup.continuation(num_drafts)
        pairs = enumerate(zip(drafts, rest, strict=False))
        held = min(len(drafts), len(rest))
        accepted = next((i for i, (draft, said) in pairs if draft != said), held)
        count.passes += 1
        count.drafted += len(drafts)
        count.accepted += accepted
        for token in rest[: accepted + 1]:
            lookup.append(token)
        done += accepted + 1
    return count


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("questions", "answers", "tokenizer"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--row-cost", type=float, default=0.05)
    args = parser.parse_args()
    turns = list(read_turns(args.questions, args.answers, args.tokenizer))
    topics = sorted({turn.topic for turn in turns})
    print(
        f"{'rule':22} {'drafted':>8} {'speed-up':>8} {ALL:>6}",
        *(f"{topic[:12]:>12}" for topic in topics),
    )
    for name, (make, num_drafts) in RULES.items():
        counts: defaultdict[str, Count] = defaultdict(Count)
        for turn in turns:
            got = replay(turn, make(), num_drafts)
            for topic in (ALL, turn.topic):
                counts[topic].passes += got.passes
                counts[topic].drafted += got.drafted
                counts[topic].accepted += got.accepted
        rates = {topic: count.accepted / count.passes for topic, count in counts.items()}
        drafted = counts[ALL].drafted / counts[ALL].passes
        by_topic = (f"{rates[topic]:12.3f}" for topic in topics)
        speedup = (1 + rates[ALL]) / (1 + args.row_cost * drafted)
        print(f"{name:22} {drafted:8.3f} {speedup:8.3f} {rates[ALL]:6.3f}", *by_topic)


if __name__ == "__main__":
    main()
