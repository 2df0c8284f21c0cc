"""Fixtures for every test."""

import flash_mlx  # noqa: F401  binds the BLAS, which works only before mlx.core is imported

# isort: split
import os
import tempfile
from pathlib import Path

import pytest

from flash_mlx.targets import LoadedTarget, load_target
from tiny import BUILDERS, build_llava, build_qwen, random_image, small_tower

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported
# Costs that tests measure, on a machine that does other things too, are for tests alone.
MEASURED = tempfile.TemporaryDirectory(prefix="flash-mlx-costs-")
os.environ["FLASH_MLX_CACHE"] = MEASURED.name


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA-1.5 checkpoint with random weights (a folder; do not change it)."""
    return build_llava(tmp_path_factory.mktemp("tiny") / "tiny-llava")


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2.5-VL checkpoint with random weights (a folder; do not change it)."""
    return build_qwen(tmp_path_factory.mktemp("tiny") / "tiny-qwen2.5-vl")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three pictures; who adds one removes it."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(3):
        random_image(60, 40, number).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def llava(tiny_llava: Path) -> LoadedTarget:
    """The tiny LLaVA-1.5, loaded (do not change it)."""
    return load_target(tiny_llava)


@pytest.fixture(scope="session")
def qwen(tiny_qwen: Path) -> LoadedTarget:
    """The tiny Qwen2.5-VL, loaded (do not change it)."""
    return load_target(tiny_qwen)


@pytest.fixture(scope="session", params=["llava", "qwen"])
def loaded(request: pytest.FixtureRequest) -> LoadedTarget:
    """Each of the tiny targets in turn (do not change them)."""
    target: LoadedTarget = request.getfixturevalue(request.param)
    return target


@pytest.fixture(scope="session", params=BUILDERS)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> LoadedTarget:
    """A tiny target of each family in turn (do not change them)."""
    folder = tmp_path_factory.mktemp("family") / request.param
    with small_tower():
        return load_target(BUILDERS[request.param](folder))
