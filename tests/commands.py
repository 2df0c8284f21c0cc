"""Running `flash-mlx` in tests, and drafters for it."""

import os
import subprocess
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import pytest

from flash_mlx.checkpoint import save_drafter
from flash_mlx.draft import FlashConfig, FlashModel

FLASH_MLX = Path(sysconfig.get_path("scripts")) / "flash-mlx"


def make_drafter(folder: Path, **sizes: int) -> Path:
    """Write a drafter with random weights; its sizes fit the tiny targets unless told otherwise."""
    mx.random.seed(0)
    fitting = {"hidden_size": 64, "vocab_size": 400, "num_heads": 2, "head_dim": 16}
    config = FlashConfig(block_size=3, num_latents=4, **(fitting | sizes))
    save_drafter(FlashModel(config), folder, {})
    return folder


def start(*words: object, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start the installed command, offline."""
    return subprocess.Popen(
        [str(FLASH_MLX), *map(str, words)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | dict(environment or {}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def fill_disk(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Let files grow by so many bytes more."""
    write, left = os.write, [room]

    def full(descriptor: int, data: bytes) -> int:
        if not left[0]:
            raise OSError(28, "No space left on device")
        done = write(descriptor, data[: left[0]])
        left[0] -= done
        return done

    monkeypatch.setattr(os, "write", full)


def command(
    *words: object, stdin: bytes = b"", environment: Mapping[str, str] | None = None
) -> tuple[int, bytes, str]:
    """Run the installed command; returns its exit code, stdout and stderr."""
    process = start(*words, environment=environment)
    out, err = process.communicate(stdin, timeout=120)
    return process.returncode, out, err.decode()
