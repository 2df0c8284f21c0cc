"""The command line: parse, call one library function, print.

Text goes to stdout, everything else to stderr. An error is one line that says what must hold, what
came and what to do. Exit codes: 0 done, 2 wrong usage, 130 interrupted, 1 any other error.
`FLASH_MLX_DEBUG=1` shows the traceback of an error.

This package imports only click and the standard library until a command runs, so that `--help`
answers at once.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import TextIO

import click

from flash_mlx.cli import (
    bench,
    caption,
    chat,
    convert,
    doctor,
    generate,
    selftest,
    serve,
    train,
    verify,
)
from flash_mlx.cli.options import INTERRUPTED


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    no_args_is_help=False,
    invoke_without_command=True,
)
@click.version_option(package_name="flash-mlx", message="%(prog)s %(version)s")
@click.pass_context
def group(context: click.Context) -> None:
    """Vision-language models that answer faster and say the same."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


group.add_command(generate.command)
group.add_command(caption.command)
group.add_command(chat.command)
group.add_command(bench.command)
group.add_command(verify.command)
group.add_command(train.command)
group.add_command(serve.command)
group.add_command(convert.command)
group.add_command(doctor.command)
group.add_command(selftest.command)


def main() -> None:
    """The `flash-mlx` command."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line.

    Args:
        arguments: The words after `flash-mlx`.

    Returns:
        The exit code.

    Raises:
        SystemExit: The reader of stdout has gone; code 1, nothing to say.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character
            stream.reconfigure(errors="replace")
    warnings.showwarning = _warn
    try:
        code = group.main(list(arguments), prog_name="flash-mlx", standalone_mode=False)
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except click.ClickException as error:
        return _fail(error, error.format_message(), error.exit_code)
    except (ValueError, OSError) as error:
        return _fail(error, str(error) or type(error).__name__, 1)
    except Exception as error:  # noqa: BLE001  the user gets one line, whatever went wrong
        text = f"{type(error).__name__}: {error} (unexpected; FLASH_MLX_DEBUG=1 shows where)"
        return _fail(error, text, 1)
    return code if isinstance(code, int) else 0


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,  # noqa: ARG001
    lineno: int,  # noqa: ARG001
    file: TextIO | None = None,  # noqa: ARG001
    line: str | None = None,  # noqa: ARG001
) -> None:
    """Print a warning as errors are printed, in one line."""
    click.echo(f"flash-mlx: {category.__name__}: {' '.join(str(message).split())}", err=True)


def _fail(error: Exception, text: str, code: int) -> int:
    if os.environ.get("FLASH_MLX_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    click.echo("flash-mlx: error: " + " ".join(text.split()), err=True)
    return code
