"""`flash-mlx chat`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flash_mlx.cli.generate import _print_stream, model_options, notices, sampling_options
from flash_mlx.cli.learn import learn_options, observed
from flash_mlx.cli.options import INTERRUPTED, ListOptions, between
from flash_mlx.cli.penalties import penalty_options
from flash_mlx.cli.report import as_json_object, statistics

if TYPE_CHECKING:
    from PIL import Image

    from flash_mlx.session import Session

HELP = "/image FILE adds a picture, /reset begins anew, /quit ends, Ctrl-C ends an answer."


@click.command("chat", cls=ListOptions)
@model_options
@learn_options
@click.option("--image", multiple=True, metavar="FILE...", help="Pictures to talk about.")
@click.option("--system", help="System message.")
@sampling_options
@penalty_options
@click.option(
    "--cache-gb",
    type=float,
    callback=between(0, 100_000),
    help="Memory for what was read, between answers; default: an eighth of the machine's.",
)
@click.option("--verbose/--no-verbose", default=False, help="Statistics on stderr; default: off.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object an answer.")
def command(
    model: str,
    draft_model: str,
    draft_block_size: int | None,
    loading: dict[str, Any],
    learn: tuple[Path | None, float],
    image: tuple[str, ...],
    system: str | None,
    cache_gb: float | None,
    verbose: bool,
    as_json: bool,
    **settings: Any,
) -> int:
    """Talk about pictures, a line at a time.

    Lines come from the terminal or from stdin. /image FILE adds a picture to the next line, /reset
    begins a new conversation about the pictures of --image, /quit ends. Ctrl-C ends an answer, and
    where there is none the program.
    """
    from flash_mlx.generate import load
    from flash_mlx.images import load_image
    from flash_mlx.session import Session

    pictures = [load_image(file) for file in image]  # before the model: fails soon
    loaded = observed(load(model, draft_model, draft_block_size=draft_block_size, **loading), learn)
    for line in notices(loaded, draft_model):
        click.echo(line, err=True)
    max_bytes = None if cache_gb is None else int(cache_gb * 1e9)
    session = Session(loaded, system=system, max_bytes=max_bytes)
    chat = _Chat(session, pictures, settings, verbose=verbose, as_json=as_json)
    if sys.stdin is not None and sys.stdin.isatty():
        click.echo(HELP, err=True)
        return chat.run(_typed())
    return chat.run(_piped(), interruptions=1)


@dataclass
class _Chat:
    """A conversation at the command line.

    Attributes:
        session: Whom the user talks to.
        images: Pictures that each conversation begins with.
        settings: Of the generation.
        verbose: Whether statistics follow an answer.
        as_json: Whether an answer is a JSON object.
        waiting: Pictures for the next line.
        failed: Whether a line could not be answered.
    """

    session: Session
    images: Sequence[Image.Image]
    settings: dict[str, Any]
    verbose: bool
    as_json: bool
    waiting: list[Image.Image] = field(default_factory=list)
    failed: bool = False

    def run(self, lines: Iterator[str], interruptions: int | None = None) -> int:
        """Answer lines until they end.

        Args:
            lines: What the user says.
            interruptions: Answers that may be interrupted before that ends the program.

        Returns:
            The exit code.
        """
        self.waiting = list(self.images)
        cut_off = 0
        for line in lines:
            word, _, rest = line.strip().partition(" ")
            if word in ("/quit", "/exit"):
                break
            try:
                cut_off += self._do(word, rest.strip(), line.strip())
            except (ValueError, OSError) as error:
                self.failed = True
                click.echo("flash-mlx: error: " + " ".join(str(error).split()), err=True)
            if interruptions is not None and cut_off > interruptions:
                return INTERRUPTED
        return 1 if self.failed and interruptions is not None else 0

    def _do(self, word: str, rest: str, line: str) -> bool:
        """Follow a command or answer; return whether the answer was interrupted."""
        from flash_mlx.images import load_image

        if word == "/reset":
            self.session.reset()
            self.waiting = list(self.images)
        elif word == "/image":
            if not rest:
                raise ValueError("/image must be followed by a file; it stands alone.")
            self.waiting.append(load_image(rest))
        elif word in ("/help", "/?"):
            click.echo(HELP, err=True)
        elif line:
            return self._answer(line)
        return False

    def _answer(self, line: str) -> bool:
        from flash_mlx.generate import join

        responses = self.session.stream(line, self.waiting, **self.settings)
        pieces, interrupted = _print_stream(responses, stream=not self.as_json)
        del responses  # closed, so that the session remembers the answer
        if pieces:
            self.waiting = []
            answer = join(pieces)
            if self.as_json:
                fields = as_json_object(self.session.model, answer, interrupted=interrupted)
                click.echo(json.dumps(fields | {"kept_tokens": answer.kept_tokens}))
            elif self.verbose:
                click.echo(statistics(answer), err=True)
                click.echo(f"Kept: {answer.kept_tokens} tokens of the prompt", err=True)
        return interrupted


def _typed() -> Iterator[str]:
    """Yield what the user types; the end of the input ends it."""
    with suppress(ImportError):  # some builds of Python lack it
        import readline  # noqa: F401  gives `input` its history and editing
    shown = sys.stdout.isatty()  # else `input` would write the prompt to a file or a pipe
    while True:
        click.echo("" if shown else "> ", nl=False, err=True)
        try:
            yield input("> " if shown else "")
        except EOFError:
            click.echo(err=True)
            return


def _piped() -> Iterator[str]:
    """Yield the lines of stdin."""
    if sys.stdin is None:
        return
    for raw in sys.stdin.buffer:
        try:
            yield raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"Lines on stdin must be UTF-8 text; {error}.") from error
