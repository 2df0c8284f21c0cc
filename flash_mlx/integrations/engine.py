"""One thread that loads a model and answers one request after the other.

MLX's streams belong to threads, and decoding one sequence uses the whole device: requests wait in a
queue. An answer that nobody waits for any more is given up after its current round. What was read
is kept within a limit of memory, so a request that goes on with an earlier one, or asks about the
same pictures again, begins where the two part.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future

from flash_mlx.generate import GenerationResponse, Model, stream_generate
from flash_mlx.integrations.chat import ChatRequest
from flash_mlx.processing import make_chat_prompt
from flash_mlx.store import TextStore

Event = GenerationResponse | Exception | None  # None: the end


class Job:
    """A request on its way; made in the event loop that reads its answer."""

    def __init__(self, request: ChatRequest) -> None:
        """Start with no answer."""
        self.request = request
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self.cancelled = threading.Event()

    def put(self, event: Event) -> None:
        """Hand over a piece of the answer, or what went wrong; from the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop has ended
            self.cancelled.set()

    async def pieces(self) -> AsyncIterator[GenerationResponse]:
        """Yield the answer; leaving early gives it up.

        Raises:
            Exception: What went wrong in the engine.
        """
        try:
            while (event := await self._events.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.cancelled.set()

    def cancel(self) -> None:
        """Give the answer up: what is there of it is its end."""
        self.cancelled.set()
        self._events.put_nowait(None)


class Engine:
    """The thread and its queue.

    Args:
        load: Returns the model; called in the thread.
        max_bytes: Memory for what was read, between answers; see `TextStore`.
    """

    def __init__(self, load: Callable[[], Model], max_bytes: int | None = None) -> None:
        """Start to load."""
        self._store = TextStore(max_bytes)
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._stopped = threading.Event()
        self._done = threading.Event()
        self._model: Future[Model] = Future()
        self._thread = threading.Thread(target=self._run, args=(load,), name="engine", daemon=True)
        self._thread.start()

    def wait(self) -> Model:
        """Return the model once it is there, for its names only.

        Raises:
            OSError: It cannot be found.
            ValueError: It is damaged.
        """
        return self._model.result()

    def submit(self, request: ChatRequest) -> Job:
        """Queue a request; from an event loop."""
        job = Job(request)
        self._jobs.put(job)
        return job

    def close(self) -> None:
        """Give up what is under way and end the thread."""
        self._stopped.set()
        self._jobs.put(None)
        self._done.wait()

    def _run(self, load: Callable[[], Model]) -> None:
        self._work(load)
        self._done.set()
        # MLX's state of a thread that ends while the interpreter does aborts the process.
        threading.Event().wait()

    def _work(self, load: Callable[[], Model]) -> None:
        try:
            model = load()
        except BaseException as error:  # noqa: BLE001  handed to whoever waits
            self._model.set_exception(error)
            return
        self._model.set_result(model)
        while (job := self._jobs.get()) is not None and not self._stopped.is_set():
            if not job.cancelled.is_set():
                self._answer(model, job)

    def _answer(self, model: Model, job: Job) -> None:
        try:
            prompt = make_chat_prompt(model.loaded, job.request.messages, digests=True)
            settings = job.request.settings
            for piece in stream_generate(model, prompt, store=self._store, **settings):
                if job.cancelled.is_set() or self._stopped.is_set():
                    break
                job.put(piece)
            job.put(None)
        except Exception as error:  # noqa: BLE001  one request's error is not another's
            job.put(error)
