"""How many drafts would have been accepted? Lookup rules on texts that real models said.

    python replay_ngram.py --questions mmspec.jsonl --answers baseline-LLaVA-1.5-7B.jsonl \
        --tokenizer llava-1.5-7b-hf [--json OUT]

No model is run: the decode loop itself is driven by the recorded texts (`flash_mlx.bench.replay`).
The files are those of the MMSpec benchmark; the tokenizer's folder holds `config.json` and
`chat_template.json`, too. Each line is a rule: its drafts per pass; how much faster than plain
decoding it would be if a draft cost a share `--row-cost` of a pass, which is no measurement; its
accepted drafts per pass, in all and by topic.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from flash_mlx.bench.replay import ALL, by_topic, read_turns
from flash_mlx.decode import Drafter
from flash_mlx.draft.ngram import BREAK, NgramDrafter, NgramRule
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.tree import DraftTree, Topology
import mlx.core as mx


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


class AutomatonDrafter:
    """Drafts what a `SuffixAutomaton` finds. Its state grows in place, so texts go one way only."""

    def __init__(self, min_length: int, latest: bool, num_drafts: int = 10) -> None:
        self.min_length, self.latest, self.num_drafts = min_length, latest, num_drafts

    def prefill(self, prompt: Prompt, hidden: mx.array, root: int) -> SuffixAutomaton:
        lookup = SuffixAutomaton(self.min_length, self.latest)
        images = {row for start, stop in prompt.image_spans for row in range(start, stop)}
        for row, token in enumerate(prompt.tokens):
            lookup.append(BREAK if row in images else token)
        return self.extend(hidden, (root,), lookup)

    def draft(
        self,
        root: int,
        state: SuffixAutomaton,
        sampler: Sampler,  # noqa: ARG002
        key: mx.array,  # noqa: ARG002
    ) -> DraftTree:
        drafts = state.continuation(self.num_drafts)
        return DraftTree(Topology.chain(len(drafts)), mx.array([root, *drafts], dtype=mx.int32))

    def extend(
        self,
        hidden: mx.array,  # noqa: ARG002
        tokens: tuple[int, ...],
        state: SuffixAutomaton,
    ) -> SuffixAutomaton:
        for token in tokens:
            state.append(token)
        return state


def ngrams(
    min_n: int, max_n: int, occurrence: Any, per_match: int | None, num_drafts: int = 10
) -> Callable[[], NgramDrafter]:
    return partial(NgramDrafter, num_drafts, NgramRule(min_n, max_n, occurrence, per_match))


RULES: dict[str, Callable[[], Drafter[Any]]] = {
    "2-3 earliest": ngrams(2, 3, "earliest", None),
    "2-3 latest": ngrams(2, 3, "latest", None),
    "automaton 2+ earliest": partial(AutomatonDrafter, 2, latest=False),
    "automaton 2+ latest": partial(AutomatonDrafter, 2, latest=True),
    "1-3 earliest": ngrams(1, 3, "earliest", None),
    "1-3 latest": ngrams(1, 3, "latest", None),
    "automaton 1+ earliest": partial(AutomatonDrafter, 1, latest=False),
    "automaton 1+ latest": partial(AutomatonDrafter, 1, latest=True),
    "1-4 latest, 2 a match": ngrams(1, 4, "latest", 2, num_drafts=8),  # the default of `ngram`
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("questions", "answers", "tokenizer"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--row-cost", type=float, default=0.05)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    turns = list(read_turns(args.questions, args.answers, args.tokenizer))
    topics = sorted({turn.topic for turn in turns})
    print(
        f"{'rule':22} {'drafted':>8} {'speed-up':>8} {ALL:>6}",
        *(f"{topic[:12]:>12}" for topic in topics),
    )
    report = {}
    for name in args.rules:
        found = report[name] = by_topic(turns, RULES[name])
        rates = {topic: counts["accepted_per_round"] for topic, counts in found.items()}
        drafted = found[ALL]["drafted"] / found[ALL]["rounds"]
        speedup = found[ALL]["mean_acceptance_length"] / (1 + args.row_cost * drafted)
        topical = (f"{rates[topic]:12.3f}" for topic in topics)
        print(f"{name:22} {drafted:8.3f} {speedup:8.3f} {rates[ALL]:6.3f}", *topical)
    if args.json is not None:
        said = {"answers": args.answers.name, "turns": len(turns), "rules": report}
        args.json.write_text(json.dumps(said) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
