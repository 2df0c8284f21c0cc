"""Several texts decoded together: their passes are joined, so weights are read once for all.

Each text keeps the loop of `decode`, with drafts, a cache, a sampler and an end of its own. A batch
lets every loop run up to its next pass, makes these passes as one, and lets each go on with what
came of its own. Texts come and go at any time, and each is the text that it would be alone: to
rounding, what a joined pass says of a tree is what a pass over that tree says.

Shapes:
    B: texts under way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol, runtime_checkable

import mlx.core as mx

from flash_mlx.around import TargetAround
from flash_mlx.decode import Cache, Drafter, Output, Round, Take, Target, decode
from flash_mlx.prompt import Prompt
from flash_mlx.tree import DraftTree


@runtime_checkable
class JoiningTarget(Target, Protocol):
    """A target that can read the trees of several texts in one pass."""

    @property
    def joins(self) -> bool:
        """Whether it really can; some models cannot."""
        ...

    def verify_together(self, trees: Sequence[DraftTree], caches: Sequence[Cache]) -> list[Output]:
        """Do what `verify` does for each tree [B] and its cache [B], in one pass; lazy."""
        ...


class Batch:
    """Texts that are decoded together.

    Args:
        target: Whose texts they are.

    Raises:
        ValueError: If the target reads one text at a time.
    """

    def __init__(self, target: Target) -> None:
        """Begin with no text."""
        if not isinstance(target, JoiningTarget) or not target.joins:
            raise ValueError(
                "Only a target that joins passes can decode texts together, and this one reads one "
                "text at a time. Leave the batch size out, or make it 1."
            )
        self._target = target
        self._seats: list[Seat] = []

    def __len__(self) -> int:
        """Return B."""
        return len(self._seats)

    def seat(self) -> Seat:
        """Return the place of one more text, which takes part once it is decoded."""
        return Seat(self, self._target)

    def step(self) -> None:
        """Let every text read its next tree, all in one pass, and go on to the one after."""
        due = [(seat, seat.due) for seat in self._seats if seat.due is not None]
        if len(due) > 1:
            trees = [tree for _, tree in due]
            outs = self._target.verify_together(trees, [seat.cache for seat, _ in due])
            mx.async_eval([out.logits for out in outs])
            for (seat, tree), out in zip(due, outs, strict=True):
                seat.ready = tree, out
        for seat, _ in due:
            seat.advance()

    def enter(self, seat: Seat) -> None:
        """Let a text take part."""
        self._seats.append(seat)

    def leave(self, seat: Seat) -> None:
        """Go on without a text."""
        with suppress(ValueError):
            self._seats.remove(seat)


class Seat(TargetAround):
    """One text's place in a batch, and to its loop the target.

    Attributes:
        cache: The target's, of this text.
        due: The tree that its loop is about to let the target read; None if there is none.
        ready: That tree and what came of it in a joined pass; None before.
    """

    def __init__(self, batch: Batch, target: Target) -> None:
        """Prepare; nothing takes part yet."""
        super().__init__(target)
        self._batch = batch
        self._rounds: deque[Round] = deque()
        self._loop: Iterator[Round] = iter(())
        self._error: Exception | None = None
        self.cache: Cache
        self.due: DraftTree | None = None
        self.ready: tuple[DraftTree, Output] | None = None

    def prefill(self, prompt: Prompt, cache: Cache, take: Take | None = None) -> Output:
        """See `Target`; the text is read alone."""
        self.cache = cache
        return self.target.prefill(prompt, cache, take)

    def verify(self, tree: DraftTree, cache: Cache) -> Output:
        """See `Target`; what was read in a joined pass is not read again."""
        ready, self.ready = self.ready, None
        if ready is not None and ready[0] is tree:
            return ready[1]
        return self.target.verify(tree, cache)

    def decode(
        self, target: Target, drafter: Drafter[Any], prompt: Prompt, **settings: Any
    ) -> Iterator[Round]:
        """Yield the rounds of `flash_mlx.decode.decode`; a pass is made for all texts at once.

        Args:
            target: This seat, or what stands before it.
            drafter: Of this text alone, or one without state.
            prompt: What to continue.
            settings: Those of `decode`.

        Raises:
            Exception: What went wrong with this text; the others go on.
        """
        self._loop = decode(target, drafter, prompt, pauses=True, **settings)
        self.advance()
        self._batch.enter(self)
        try:
            while True:
                while self._rounds:
                    yield self._rounds.popleft()
                if self.due is None:
                    break
                self._batch.step()
            if self._error is not None:
                raise self._error
        finally:
            self._batch.leave(self)

    def advance(self) -> None:
        """Run this text's loop up to its next pass, or to its end."""
        self.due = None
        try:
            for each in self._loop:
                self.due = each.due
                if each.due is not None:
                    return
                self._rounds.append(each)
        except Exception as error:  # noqa: BLE001  it is this text's own: raised where that is read
            self._error = error
