"""Checks of options and lists of values, shared by the commands."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

INTERRUPTED = 130  # exit code
# Parameters of `load`, by the options' names.
LOADING = ("revision", "keep_quantized", "force", "kv_bits", "kv_group_size", "max_pixels")

Value = float | tuple[float, ...] | None
Command = TypeVar("Command", bound=Callable[..., Any])
Check = Callable[[click.Context, click.Parameter, Value], Value]


class ListOptions(click.Command):
    """A command whose options listed in `lists` take several values: `--image a.png b.png`."""

    lists: tuple[str, ...] = ("--image", "--video")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Spread the values over repeated options before click reads them."""
        return super().parse_args(ctx, spread(args, self.lists))


def spread(arguments: Sequence[str], lists: Sequence[str]) -> list[str]:
    """Repeat an option before each of its values.

    `--image a b --seed 1` becomes `--image a --image b --seed 1`.

    Args:
        arguments: The words of a command line.
        lists: Options that take several values.

    Returns:
        The words with each listed option before each of its values.
    """
    words: list[str] = []
    option: str | None = None  # the listed option whose further values may follow
    expects_value = False
    for word in arguments:
        if expects_value:
            expects_value = False
        elif word.partition("=")[0] in lists:
            option = word.partition("=")[0]
            expects_value = "=" not in word
        elif word.startswith("-"):
            option = None
        elif option is not None:
            words.append(option)
        words.append(word)
    return words


def require_writable(option: str, file: Path) -> None:
    """Find out before the run whether its result can be written.

    Raises:
        OSError: It cannot.
    """
    folder = file.parent
    writable = folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
    if not writable or (file.exists() and not os.access(file, os.W_OK)):
        raise OSError(f"{option} must name a file in a folder that can be written; got {file}.")


def require_hub_id(name: str, revision: str | None) -> None:
    """Require a model whose revision is named to be one of the hub.

    Raises:
        UsageError: It is the demo or on this machine.
    """
    if revision is not None and (name == "demo" or Path(name).expanduser().exists()):
        raise click.UsageError(
            f"--revision must name a revision of a model on the hub; {name} is not from there. "
            "Leave it out."
        )


def at_least(low: float) -> Check:
    """A value of `low` or more."""
    return _check(lambda value: value >= low, f"must be {low:g} or more")


def above(low: float) -> Check:
    """A value above `low`."""
    return _check(lambda value: value > low, f"must be above {low:g}")


def between(low: float, high: float, *, open_low: bool = False) -> Check:
    """A value from `low` (itself excluded if `open_low`) to `high`."""
    if open_low:
        words = f"must be above {low:g} and at most {high:g}"
        return _check(lambda value: low < value <= high, words)
    return _check(lambda value: low <= value <= high, f"must be between {low:g} and {high:g}")


def _check(holds: Callable[[float], bool], words: str) -> Check:
    def check(context: click.Context, parameter: click.Parameter, value: Value) -> Value:
        """Check one value, all values of an option given several times, or none."""
        for each in value if isinstance(value, tuple) else (value,):
            # Not a number fails every comparison, and an infinity is no setting.
            if each is not None and not (holds(each) and abs(each) != float("inf")):
                raise click.UsageError(f"{parameter.opts[0]} {words}; got {each:g}.", context)
        return value

    return check


def loading_options(command: Command) -> Command:
    """Options that say how models are fetched and loaded; the command gets them as `loading`."""

    @wraps(command)
    def gathered(**given: Any) -> Any:
        loading = {name: given.pop(name) for name in LOADING}
        require_hub_id(given["model"], loading["revision"])
        for name in ("kv_bits", "kv_group_size"):
            loading[name] = None if loading[name] is None else int(loading[name])
        return command(loading=loading, **given)

    wrapped: Any = gathered
    for option in (
        click.option(
            "--max-pixels",
            type=int,
            callback=at_least(1),
            help="Most pixels of a picture after resizing (Qwen's families).",
        ),
        click.option(
            "--kv-group-size",
            type=click.Choice(["32", "64", "128"]),
            default="64",
            show_default=True,
            help="Numbers of the cache that share a scale.",
        ),
        click.option(
            "--kv-bits",
            type=click.Choice(["2", "3", "4", "6", "8"]),
            help="Quantise the cache, from its first row on.",
        ),
        click.option("--force", is_flag=True, help="Download however large it is."),
        click.option(
            "--keep-quantized",
            is_flag=True,
            help="Leave quantised weights quantised on a CPU, where float32 is faster.",
        ),
        click.option(
            "--revision", metavar="NAME", help="Branch, tag or commit of the target's hub id."
        ),
    ):
        wrapped = option(wrapped)
    made: Command = wrapped
    return made
