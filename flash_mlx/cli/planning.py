"""`flash-mlx train --plan`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import click
import mlx.core as mx

from flash_mlx.checkpoint import resolve_path
from flash_mlx.cli.asking import find
from flash_mlx.cli.beginning import origin
from flash_mlx.cli.training import HIDDEN_BYTES, settings
from flash_mlx.draft.config import FlashConfig
from flash_mlx.files import read_json
from flash_mlx.loading import DEMO
from flash_mlx.train import TrainConfig
from flash_mlx.train.initial import default_config
from flash_mlx.train.plan import advice, chunk_for, plan, text_sizes
from flash_mlx.train.traffic import read_lines


def show_plan(options: Mapping[str, Any]) -> None:
    """Print what a run would take; only the target's `config.json` is read.

    Raises:
        OSError: There is no such file.
        ValueError: It lacks a size.
    """
    name = options["model"]
    folder = DEMO / "target"
    if name != "demo":
        folder = resolve_path(name, options["revision"], only=("config.json",))
    target = read_json(folder / "config.json")
    begin = origin(options)
    config, sizes = settings(options, begin)
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    if not on_cpu and "dtype" not in options["settings"]:
        config = replace(config, dtype="bfloat16")
    shape = default_config(*text_sizes(target), sizes)
    if begin is not None:
        if not isinstance(begin.config, FlashConfig):
            raise click.UsageError(f"--plan knows FLASH drafters; {begin.name} is {begin.kind}.")
        shape = begin.config
    if "chunk" not in options["settings"]:
        config = replace(config, chunk=chunk_for(shape))
    count = config.iterations * config.batch_size * config.accumulate
    if options["data"] or options["from_traffic"]:
        count = min(count, _count_answers(options, config))
    estimate = plan(
        target,
        shape,
        config,
        answer_tokens=options["max_tokens"],
        hidden_bytes=HIDDEN_BYTES,
        num_examples=count,
        float32=on_cpu,
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for what, size in {**estimate.parts, "total": estimate.total}.items():
        click.echo(f"{what:14} {size / 1e6:12,.1f} MB")
    click.echo(f"This machine has {memory / 1e9:.0f} GB. {advice(estimate, config, memory)}")
    click.echo(f"Projected hours, with {count} answers, by the chips' published figures:")
    for chip, hours in estimate.hours(config.iterations, count).items():
        click.echo(f"{chip:14} {hours:12.2f}")


def _count_answers(options: Mapping[str, Any], config: TrainConfig) -> int:
    """Return how many answers a run would learn from, if all lines of the traffic can be used."""
    count = 0
    if options["data"]:
        each = 1 if options["answers"] == "dataset" else len(options["temperatures"])
        count = each * len(find(options, config).questions)
    if options["from_traffic"]:
        count += len(read_lines(options["from_traffic"]))
    return count
