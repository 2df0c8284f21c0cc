"""Fixtures for kernels."""

from collections.abc import Iterator

import mlx.core as mx
import pytest

from emulator import Emulator, why_not
from flash_mlx.kernels import metal


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """Every kernel launched in the test runs in this emulator."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    emulator = Emulator()
    monkeypatch.setattr(mx.fast, "metal_kernel", emulator.metal_kernel)
    metal.build.cache_clear()
    yield emulator
    metal.build.cache_clear()


@pytest.fixture
def forced(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    """As on a Mac with FLASH_MLX_KERNELS=force."""
    monkeypatch.setattr(metal, "available", lambda: True)
    monkeypatch.setenv("FLASH_MLX_KERNELS", "force")
    return emulator
