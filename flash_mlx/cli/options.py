"""Checks of options and lists of values, shared by the commands."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import click

INTERRUPTED = 130  # exit code

Value = float | tuple[float, ...] | None
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
