"""`flash-mlx train --plan`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import click
import mlx.core as mx

from flash_mlx.checkpoint import resolve_path
from flash_mlx.cli.training import HIDDEN_BYTES, settings
from flash_mlx.files import read_json
from flash_mlx.loading import DEMO
from flash_mlx.train.initial import default_config
from flash_mlx.train.plan import advice, chunk_for, plan, text_sizes
from flash_mlx.train.source import find_questions


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
    config, sizes = settings(options)
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    if not on_cpu and "dtype" not in options["settings"]:
        config = replace(config, dtype="bfloat16")
    shape = default_config(*text_sizes(target), sizes)
    if "chunk" not in options["settings"]:
        config = replace(config, chunk=chunk_for(shape))
    count = config.iterations * config.batch_size * config.accumulate
    if options["data"]:
        found = find_questions(options["data"], image_folder=options["image_folder"])
        asked = options["prompts_per_image"] * min(
            len(found.questions), options["limit"] or len(found.questions)
        )
        count = min(count, asked * len(options["temperatures"]))
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
