"""Drafting without a model: what followed the last time the text stood where it stands now.

An n-gram is n tokens in a row. The last tokens of prompt and output are looked up in the text
before them, the longest n-gram first, and the tokens that followed there are the drafts. A long
match is a better omen than a short one, so each matched token pays for a few drafts.

An index of n-grams grows with the text, so a round costs the same however long the text is. Rows
that hold an image are no text: nothing matches across them, and they are never drafted.

Shapes:
    T: rows of the prompt.    A: rows accepted in a round.    D: hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

import mlx.core as mx

from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.tree import DraftTree, Topology

Occurrence = Literal["latest", "earliest"]

NUM_DRAFTS = 8
PATIENCE = 3  # rounds in a row without a match, after which the next is taken to have none either
BREAK = -1  # stands in a text where an image does; no token has this id


@dataclass(frozen=True)
class NgramRule:
    """What counts as a match, and how much of what followed it is drafted.

    The defaults are the best of those that `examples/replay_ngram.py` compares. vLLM's rule is
    `NgramRule(min_n, max_n, "earliest", drafts_per_match=None)`.

    Attributes:
        min_n: Fewest tokens that match.
        max_n: Most tokens that are compared.
        occurrence: Which one counts if an n-gram occurs more than once.
        drafts_per_match: Most drafts for each token matched; None: no such limit.

    Raises:
        ValueError: If a number is below 1, or `max_n` below `min_n`.
    """

    min_n: int = 1
    max_n: int = 4
    occurrence: Occurrence = "latest"
    drafts_per_match: int | None = 2

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 1 <= self.min_n <= self.max_n:
            raise ValueError(
                f"N-grams must have 1 token or more, and max_n must not be below min_n; "
                f"got {self.min_n} to {self.max_n}."
            )
        if self.drafts_per_match is not None and self.drafts_per_match < 1:
            raise ValueError(
                f"A matched token must bring 1 draft or more; got {self.drafts_per_match}."
            )


class Text:
    """Tokens in order, and where each n-gram occurs. It only grows.

    Args:
        rule: Which n-grams are indexed.
        tokens: To begin with.
    """

    def __init__(self, rule: NgramRule, tokens: Iterable[int] = ()) -> None:
        """Index the tokens."""
        self._rule = rule
        self._tokens: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}  # n-gram -> place of the token after it
        self._run = 0  # tokens since the last break
        for token in tokens:
            self.append(token)

    def __len__(self) -> int:
        """Number of tokens, breaks included."""
        return len(self._tokens)

    def append(self, token: int) -> None:
        """Add a token, or a break.

        The n-grams before it are indexed only now that something follows them, so that the end of
        the text never matches itself.
        """
        if token == BREAK:
            self._run = 0
        else:
            place = len(self)
            for n in self._lengths():
                ngram = tuple(self._tokens[place - n :])
                if self._rule.occurrence == "latest" or ngram not in self._places:
                    self._places[ngram] = place
            self._run += 1
        self._tokens.append(token)

    def head(self, length: int) -> Text:
        """Return a text of its own with the first `length` tokens."""
        return Text(self._rule, self._tokens[:length])

    def match(self) -> tuple[int, int] | None:
        """Return n of the longest n-gram at the end that occurred before, and what place followed.

        None if there is no such n-gram.
        """
        for n in reversed(self._lengths()):
            place = self._places.get(tuple(self._tokens[-n:]))
            if place is not None:
                return n, place
        return None

    def continuation(self, limit: int) -> tuple[int, ...]:
        """Return what followed the longest n-gram at the end, at most `limit` tokens of it."""
        match = self.match()
        if match is None:
            return ()
        n, place = match
        if self._rule.drafts_per_match is not None:
            limit = min(limit, n * self._rule.drafts_per_match)
        following = self._tokens[place : place + limit]
        return tuple(takewhile(lambda token: token != BREAK, following))

    def _lengths(self) -> range:
        """The n of the n-grams at the end of the text."""
        return range(self._rule.min_n, min(self._rule.max_n, self._run) + 1)


@dataclass(frozen=True, eq=False)
class NgramState:
    """A text and its drafts; a value, never changed.

    Attributes:
        text: Holds this state's text in its first `length` tokens, and later ones of others.
        length: Tokens of this state's text, the root included; an image counts as one.
        drafts: What may follow the root, one after the other.
        misses: Rounds in a row without a match, this one included.
        matched: Tokens that matched; 0 if none did.
    """

    text: Text
    length: int
    drafts: tuple[int, ...]
    misses: int
    matched: int = 0

    def own_text(self) -> Text:
        """Return the text to append to: the shared one, unless it went on differently since."""
        return self.text if len(self.text) == self.length else self.text.head(self.length)


class NgramDrafter:
    """Drafts from the text itself; implements `decode.Drafter[NgramState]`.

    Args:
        num_drafts: Most tokens to draft in a round; `NUM_DRAFTS` if None.
        rule: How they are found.

    Raises:
        ValueError: If `num_drafts` is below 1.

    Source:
        Saxena 2023, prompt lookup decoding; the order of n-grams and of matches as in vLLM.
    """

    def __init__(self, num_drafts: int | None = None, rule: NgramRule | None = None) -> None:
        """Prepare the chains."""
        num_drafts = NUM_DRAFTS if num_drafts is None else num_drafts
        if num_drafts < 1:
            raise ValueError(f"The number of drafts must be 1 or more; got {num_drafts}.")
        self.num_drafts = num_drafts
        self.rule = NgramRule() if rule is None else rule
        self._chains = tuple(map(Topology.chain, range(num_drafts + 1)))

    def prefill(self, prompt: Prompt, hidden: mx.array, root: int) -> NgramState:
        """Read the prompt and the first token after it.

        Args:
            prompt: T rows.
            hidden: [T, D], not used.
            root: The token that follows the prompt.
        """
        return self.extend(hidden, (root,), self._read(prompt, 0, len(prompt), Text(self.rule)))

    def read(
        self, prompt: Prompt, start: int, hidden: mx.array, state: NgramState | None
    ) -> NgramState:
        """Read rows of a prompt.

        Args:
            prompt: T rows.
            start: The first row to read.
            hidden: [R, D], not used but for R.
            state: After the rows before; None if there are none.
        """
        text = Text(self.rule) if state is None else state.own_text()
        return self._read(prompt, start, start + hidden.shape[0], text)

    def rewind(self, state: NgramState, rows: int) -> NgramState:
        """Return the state `rows` tokens earlier, for `read` to go on from; it has no root."""
        text = state.text.head(state.length - rows - 1)
        return NgramState(text, len(text), (), 0)

    def draft(self, root: int, state: NgramState, sampler: Sampler, key: mx.array) -> DraftTree:  # noqa: ARG002
        """Return a chain; without a match the root alone.

        A match may end with any token, so a pass ahead may be for nothing. Where nothing has
        matched for `PATIENCE` rounds, that is rare, and the tree hints (`DraftTree.lookahead`) that
        the next one is the root alone too: such text is then as fast as plain decoding. A wrong
        hint costs one pass, after which the count begins anew.

        Args:
            root: The token that the drafts follow.
            state: What `prefill` or `extend` returned when they read `root`.
            sampler: Not used: the drafts are deterministic.
            key: Not used.
        """
        tokens = mx.array((root, *state.drafts), dtype=mx.int32)
        lookahead = state.misses >= PATIENCE
        return DraftTree(self._chains[len(state.drafts)], tokens, lookahead=lookahead)

    def extend(self, hidden: mx.array, tokens: tuple[int, ...], state: NgramState) -> NgramState:  # noqa: ARG002
        """Read the tokens of a round.

        Args:
            hidden: [A, D], not used.
            tokens: [A] ids; the last is the new root.
            state: The state that the round began with; it stays valid.
        """
        text = state.own_text()
        for token in tokens:
            text.append(token)
        return self._state(text, state.misses)

    def _read(self, prompt: Prompt, start: int, stop: int, text: Text) -> NgramState:
        """Append rows `start` to `stop` of a prompt to the text of those before."""
        for first, end in prompt.image_spans:
            for token in prompt.tokens[start : min(first, stop)]:
                text.append(token)
            if start <= first < stop:
                text.append(BREAK)
            start = max(start, end)
        for token in prompt.tokens[start:stop]:
            text.append(token)
        return NgramState(text, len(text), (), 0)

    def _state(self, text: Text, misses: int = 0) -> NgramState:
        """Look drafts up; `misses` counts the rounds before."""
        drafts, match = text.continuation(self.num_drafts), text.match()
        matched = 0 if match is None else match[0]
        return NgramState(text, len(text), drafts, 0 if drafts else misses + 1, matched)
