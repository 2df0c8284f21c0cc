"""A conversation about pictures that reads each part of it once.

    session = Session(load())
    print(session.ask("What is this?", image="a.png").text)
    print(session.ask("And what is to the left?").text)  # looks at no picture again
    session.reset()
    print(session.ask("How many colours are there?", image="a.png").text)  # nor does this

An answer is the one that `generate` gives to the same conversation, but takes less time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from flash_mlx.generate import GenerationResponse, as_pictures, join, stream_generate
from flash_mlx.loading import Model
from flash_mlx.messages import Message, opened
from flash_mlx.processing import Media, make_chat_prompt
from flash_mlx.store import TextStore


class Session:
    """Turns of a user and a model, and what the model has read so far.

    Attributes:
        model: Who answers.
        store: What was read, also in conversations before `reset`.
        messages: What was said, the system message first if there is one.
    """

    def __init__(
        self, model: Model, *, system: str | None = None, max_bytes: int | None = None
    ) -> None:
        """Begin a conversation.

        Args:
            model: From `load`.
            system: A message before the conversation.
            max_bytes: Memory for what was read, between answers; see `TextStore`.

        Raises:
            ValueError: If the limit is negative.
        """
        self.model = model
        self.store = TextStore(max_bytes)
        self._first = () if system is None else (Message("system", system),)
        self.messages: tuple[Message, ...] = self._first

    def reset(self) -> None:
        """Begin a new conversation; what was read is kept."""
        self.messages = self._first

    def stream(
        self,
        text: str,
        image: Media | Sequence[Media] | None = None,
        **settings: Any,
    ) -> Iterator[GenerationResponse]:
        """Answer the next turn piece by piece.

        The turn is remembered when the answer ends. One that the caller or Ctrl-C cuts off is
        remembered as far as it came, and one that an error ends is not.

        Args:
            text: What the user says.
            image: Pictures and videos that come with it; those of earlier turns need not be
                repeated.
            settings: As `stream_generate` takes them, but for `system` and `store`.

        Raises:
            OSError: An image cannot be opened.
            ValueError: As `stream_generate`, or the conversation no longer fits in the context.
        """
        native = self.model.loaded.family.video_token is not None
        pictures = tuple(opened(each, native=native) for each in as_pictures(image))
        turn = (*self.messages, Message("user", text, pictures))
        prompt = make_chat_prompt(self.model.loaded, turn, digests=True)
        responses = stream_generate(self.model, prompt, store=self.store, **settings)
        return self._remember(turn, responses)

    def ask(
        self,
        text: str,
        image: Media | Sequence[Media] | None = None,
        **settings: Any,
    ) -> GenerationResponse:
        """Answer the next turn at once; arguments and errors are those of `stream`."""
        return join(list(self.stream(text, image, **settings)))

    def _remember(
        self, turn: tuple[Message, ...], responses: Iterator[GenerationResponse]
    ) -> Iterator[GenerationResponse]:
        said: list[str] = []
        failed = False
        try:
            for response in responses:
                said.append(response.text)
                yield response
        except Exception:
            failed = True
            raise
        finally:
            if said and not failed:
                # Templates put the spaces around an answer themselves.
                self.messages = (*turn, Message("assistant", "".join(said).strip()))
