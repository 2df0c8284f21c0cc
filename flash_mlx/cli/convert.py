"""`flash-mlx convert`."""

from __future__ import annotations

from pathlib import Path

import click

from flash_mlx.cli.options import require_hub_id

KINDS = ("eagle", "eagle3", "flash", "msd", "vispec")
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
@click.option(
    "--target", metavar="PATH", help="Of a drafter: its target, whose copies are then dropped."
)
@click.option("--draft-kind", type=click.Choice(KINDS), help="Where the tensors do not say.")
@click.option("--upload-repo", metavar="ID", help="Of a target: upload the result to this hub id.")
@click.option(
    "--export",
    type=click.Choice(["mlx-vlm"]),
    help="Of a FLASH drafter (or demo): write a folder that mlx-vlm itself drafts with.",
)
@click.option("--force", is_flag=True, help="Download even if disk or memory seem too small.")
def command(
    hf_path: str,
    mlx_path: Path,
    quantize: bool,
    q_bits: str,
    q_group_size: str,
    dtype: str | None,
    revision: str | None,
    target: str | None,
    draft_kind: str | None,
    upload_repo: str | None,
    export: str | None,
    force: bool,
) -> None:
    """Convert a target's or a published drafter's weights to MLX."""
    require_hub_id(hf_path, revision)
    import mlx.core as mx

    from flash_mlx.convert import convert_drafter, convert_target, is_drafter
    from flash_mlx.convert.folder import require_new
    from flash_mlx.hub import resolve_path

    require_new(mlx_path)
    if export is not None:
        given = {
            "--quantize": quantize,
            "--dtype": dtype,
            "--target": target,
            "--draft-kind": draft_kind,
            "--upload-repo": upload_repo,
        }
        if useless := [flag for flag, value in given.items() if value]:
            raise click.UsageError(
                f"--export copies a drafter as it is, so it takes no {' and no '.join(useless)}. "
                "Convert the drafter first, then export the result."
            )
        _export(hf_path, mlx_path, revision, force=force)
        return
    source = resolve_path(hf_path, revision, torch_files=True, force=force)
    bits, group_size = int(q_bits) if quantize else None, int(q_group_size)
    if draft_kind is None and not is_drafter(source):
        if target is not None:
            raise click.UsageError(f"--target is for drafters, and {hf_path} is none.")
        folder = convert_target(
            str(source),
            mlx_path,
            bits=bits,
            group_size=group_size,
            dtype=dtype,
            upload_repo=upload_repo,
        )
        click.echo(f"Wrote {folder}", err=True)
        return
    if upload_repo is not None:
        raise click.UsageError(f"--upload-repo is for targets, and {hf_path} is a drafter.")
    done = convert_drafter(
        source,
        mlx_path,
        name=hf_path,
        target=None if target is None else resolve_path(target, force=force),
        bits=bits,
        group_size=group_size,
        dtype=None if dtype is None else getattr(mx, dtype),
        kind=draft_kind,
    )
    click.echo(
        f"{hf_path} is a drafter of the kind {done.kind} with {done.parameters / 1e6:.1f} million "
        f"parameters. {' '.join(done.remarks)}\nWrote {done.folder}: {done.size / 1e9:.3f} GB",
        err=True,
    )


def _export(name: str, folder: Path, revision: str | None, *, force: bool) -> None:
    from flash_mlx.convert.folder import appearing
    from flash_mlx.hub import resolve_path
    from flash_mlx.integrations.mlx_vlm import export
    from flash_mlx.loading import DEMO

    source = DEMO / "drafter" if name == "demo" else resolve_path(name, revision, force=force)
    with appearing(folder) as partial:
        export(source, partial)
    click.echo(f"Wrote {folder}: mlx_vlm.generate --draft-model {folder}", err=True)
