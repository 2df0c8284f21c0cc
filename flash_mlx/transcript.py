"""From rounds of ids to text, and where a stop string ends it.

A stop string may begin in one token and end in another, of the same round or of a later one. Text
that may yet become one is held back; the token that completes one is the last of the answer, so ids
and text are those of plain decoding, however many tokens a round brings.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from flash_mlx.decode import Round
from flash_mlx.processing import Detokenizer


def check_stop_strings(stop: object) -> tuple[str, ...]:
    """Return stop strings as a tuple.

    Args:
        stop: One string, several, or None.

    Raises:
        ValueError: If one is empty, no text, or not valid Unicode.
    """
    strings = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence):
        raise ValueError(f"Stop strings must be a string or a list of strings; got {stop!r}.")
    for string in strings:
        if not isinstance(string, str) or not string or _is_broken(string):
            raise ValueError(f"A stop string must be text, and not empty; got {string!r}.")
    return tuple(strings)


class StopStrings:
    """Looks for strings in text that comes in pieces."""

    def __init__(self, strings: Sequence[str]) -> None:
        """Start with no text.

        Args:
            strings: From `check_stop_strings`; without one, all text passes.
        """
        self._strings = tuple(strings)
        self._held = ""  # may be the beginning of a stop string

    def add(self, text: str) -> tuple[str, bool]:
        """Return what no stop string can take any more, and whether one is complete.

        What stands before the one that is complete first is the last text that is returned.
        """
        text = self._held + text
        found = [(text.find(s) + len(s), text.find(s)) for s in self._strings if s in text]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        lengths = (n for s in self._strings for n in range(1, len(s)) if text.endswith(s[:n]))
        sure = len(text) - max(lengths, default=0)
        self._held = text[sure:]
        return text[:sure], False

    def finish(self) -> str:
        """Return what was held back."""
        held, self._held = self._held, ""
        return held


class Transcript:
    """The text of a decoding, round by round.

    Attributes:
        stopped: Whether a stop token or a stop string has ended the text; neither shows.
        num_drafted: Of the text of the last round, characters at its start that came with
            accepted drafts.
    """

    def __init__(self, processor: Any, stop_ids: Collection[int], stop: Sequence[str] = ()) -> None:
        """Start with no text.

        Args:
            processor: A target's, for its `tokenizer`.
            stop_ids: Ids that end the text.
            stop: Strings that end it, from `check_stop_strings`.
        """
        self.stopped = False
        self.num_drafted = 0
        self._stop_ids = stop_ids
        self._detokenizer = Detokenizer(processor)
        self._strings = StopStrings(stop)
        self._text = ""

    def watch(self, rounds: Iterable[Round]) -> Iterator[Round]:
        """Yield rounds as far as the text goes; the last one may be cut short."""
        for each in rounds:
            kept = self._read(each.tokens, each.num_accepted)
            yield replace(
                each, tokens=each.tokens[:kept], num_accepted=min(each.num_accepted, kept)
            )
            if self.stopped:
                return

    def take(self) -> str:
        """Return the new text, as far as it is certain."""
        text, self._text = self._text, ""
        return text

    def finish(self) -> str:
        """Return the rest of the text, once there are no more rounds."""
        if not self.stopped:
            self._add(self._detokenizer.finish())
        return self.take() + self._strings.finish()

    def _read(self, tokens: tuple[int, ...], num_accepted: int) -> int:
        """Read the tokens of a round up to the one that ends the text; returns how many."""
        before, self.num_drafted = len(self._text), 0
        for count, token in enumerate(tokens, start=1):
            if token in self._stop_ids:
                self._add(self._detokenizer.finish())
                self.stopped = True
            else:
                self._add(self._detokenizer.add((token,)))
            if count <= num_accepted:
                self.num_drafted = len(self._text) - before
            if self.stopped:
                return count
        return len(tokens)

    def _add(self, text: str) -> None:
        text, stopped = self._strings.add(text)
        self._text += text
        self.stopped = self.stopped or stopped


def hidden_ids(processor: Any, stop: Sequence[str]) -> frozenset[int]:
    """Return the ids of stop strings that are special tokens: those end a text but never show.

    Args:
        processor: A target's, for its `tokenizer`.
        stop: From `check_stop_strings`.
    """
    special = {
        str(token): number
        for number, token in processor.tokenizer.added_tokens_decoder.items()
        if token.special
    }
    return frozenset(special[string] for string in stop if string in special)


def _is_broken(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False
