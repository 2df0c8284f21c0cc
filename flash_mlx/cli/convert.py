"""`flash-mlx convert`."""

from __future__ import annotations

from pathlib import Path

import click

DTYPES = ("float16", "bfloat16", "float32")


@click.command("convert")
@click.option(
    "--hf-path", required=True, metavar="PATH", help="Checkpoint to convert: a folder or a hub id."
)
@click.option(
    "--mlx-path", required=True, metavar="DIR", type=click.Path(path_type=Path), help="New folder."
)
@click.option("-q", "--quantize", is_flag=True, help="Quantise the language model.")
@click.option(
    "--q-bits",
    type=click.Choice(["2", "3", "4", "5", "6", "8"]),
    default="4",
    show_default=True,
    help="Bits of a weight.",
)
@click.option(
    "--q-group-size",
    type=click.Choice(["32", "64", "128"]),
    default="64",
    show_default=True,
    help="Weights that share a scale.",
)
@click.option("--dtype", type=click.Choice(DTYPES), help="Type to store; default: as it comes.")
@click.option("--revision", metavar="NAME", help="Branch, tag or commit of a hub id.")
def command(
    hf_path: str,
    mlx_path: Path,
    quantize: bool,
    q_bits: str,
    q_group_size: str,
    dtype: str | None,
    revision: str | None,
) -> None:
    """Convert a target's Hugging Face weights to an MLX checkpoint."""
    from flash_mlx.convert.target import convert_target

    folder = convert_target(
        hf_path,
        mlx_path,
        bits=int(q_bits) if quantize else None,
        group_size=int(q_group_size),
        dtype=dtype,
        revision=revision,
    )
    click.echo(f"Wrote {folder}", err=True)
