"""Options for penalties and biases."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from flash_mlx.cli.options import above, at_least, between

Command = TypeVar("Command", bound=Callable[..., Any])


def penalty_options(command: Command) -> Command:
    """Options that make some tokens rarer or more frequent; unset, they do nothing."""
    for option in (
        click.option(
            "--logit-bias",
            multiple=True,
            metavar="ID=VALUE",
            callback=_read_biases,
            help="Add VALUE to the logit of token ID; -inf bans it. Repeatable.",
        ),
        _context_size("frequency"),
        click.option(
            "--frequency-penalty",
            type=float,
            callback=between(-2, 2),
            help="Make tokens rarer for each time they were said lately; 0: off.",
        ),
        _context_size("presence"),
        click.option(
            "--presence-penalty",
            type=float,
            callback=between(-2, 2),
            help="Make tokens rarer once they were said lately; 0: off.",
        ),
        _context_size("repetition"),
        click.option(
            "--repetition-penalty",
            type=float,
            callback=above(0),
            help="Divide the logits of tokens said lately; 1: off.",
        ),
    ):
        command = option(command)
    return command


def _context_size(penalty: str) -> Callable[[Command], Command]:
    return click.option(
        f"--{penalty}-context-size",
        type=int,
        default=20,
        show_default=True,
        metavar="N",
        callback=at_least(1),
        help=f"Tokens that the {penalty} penalty looks back.",
    )


def _read_biases(
    context: click.Context,
    parameter: click.Parameter,  # noqa: ARG001
    values: Sequence[str],
) -> dict[int, float]:
    """Return token id to bias from words `ID=VALUE`.

    Raises:
        UsageError: A word is none of these, or two are about the same token.
    """
    biases: dict[int, float] = {}
    for value in values:
        token, _, number = value.partition("=")
        try:
            bias = float(number)
        except ValueError:
            bias = math.nan
        if not (token.isdecimal() and bias < math.inf):  # which NaN is not either
            raise click.UsageError(
                "--logit-bias must be ID=VALUE, a token id and what its logit gets, like 13=-2.5 "
                f"(-inf bans the token); got {value}.",
                context,
            )
        if int(token) in biases:
            raise click.UsageError(f"--logit-bias must be given once a token; got {value} too.")
        biases[int(token)] = bias
    return biases
