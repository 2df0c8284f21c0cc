"""Checkpoints that are damaged or lie, at `convert`: one line, and nothing written anywhere."""

import json
import resource
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from commands import FLASH_MLX
from flash_mlx.cli import run
from published import publish
from tiny import edit_json

WEIGHTS = "model.safetensors"


def cut(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


def lie(folder: Path) -> None:
    header = json.dumps({"a.weight": {"dtype": "F32", "shape": [9, 9], "data_offsets": [0, 324]}})
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(8))


def claim(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**60) + b"{}")


def miss(folder: Path) -> None:
    index(folder, "model-00001-of-00002.safetensors")


def leave(folder: Path) -> None:
    index(folder, "../secret/model.safetensors")


def index(folder: Path, name: str) -> None:
    text = json.dumps({"weight_map": {"lm_head.weight": name}})
    (folder / f"{WEIGHTS}.index.json").write_text(text)


def spoil(folder: Path, change: Callable[[mx.array], mx.array] = lambda x: x * mx.nan) -> None:
    tensors = mx.load(str(folder / WEIGHTS))
    mx.eval(tensors)
    name = next(name for name in tensors if "mlp.up_proj" in name)
    mx.save_safetensors(str(folder / WEIGHTS), tensors | {name: change(tensors[name])})


def whole_numbers(folder: Path) -> None:
    spoil(folder, lambda x: x.astype(mx.int32))


DAMAGE = {
    cut: "must be a whole safetensors file",
    lie: "must be a whole safetensors file",
    claim: "must be a whole safetensors file",
    miss: "which is missing",
    leave: "must name .safetensors files beside it",
    spoil: "finite",
    whole_numbers: "floating-point",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("what", ["target", "drafter"])
def test_damaged_weights_leave_nothing(
    what: str,
    damage: Callable[[Path], None],
    tiny_llava: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "source"
    if what == "target":
        shutil.copytree(tiny_llava, source)
    else:
        publish(source, "eagle")
    damage(source)
    (tmp_path / "secret").mkdir()
    before = everything(tmp_path)
    words = ["convert", "--hf-path", str(source), "--mlx-path", str(tmp_path / "out")]
    assert run(words) == 1
    said = capfd.readouterr().err.strip().splitlines()
    assert said[-1].startswith("flash-mlx: error: ")
    assert DAMAGE[damage] in said[-1]
    assert not any("Traceback" in line for line in said)
    assert everything(tmp_path) == before


def test_an_unknown_family_names_those_that_are_known(
    tiny_llava: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(tiny_llava, tmp_path / "source"))
    edit_json(source, "config.json", model_type="telepathy")
    words = ["--hf-path", str(source), "--mlx-path", str(tmp_path / "out")]
    assert run(["convert", *words]) == 1
    said = capfd.readouterr().err
    assert "qwen2_5_vl" in said
    assert "'telepathy'" in said
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    assert run(["convert", *words]) == 1
    assert "must be new or empty" in capfd.readouterr().err
    assert (tmp_path / "out" / "mine").read_text() == "kept"


@pytest.mark.parametrize("what", ["target", "drafter"])
def test_a_disk_that_is_full_leaves_nothing(what: str, tiny_llava: Path, tmp_path: Path) -> None:
    source = tiny_llava if what == "target" else publish(tmp_path / "source", "eagle")
    most = 20_000  # bytes of a file: the system refuses to write more, as it would on a full disk
    done = subprocess.run(
        [FLASH_MLX, "convert", "--hf-path", source, "--mlx-path", tmp_path / "out"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),
    )
    assert done.returncode == 1, done.stderr
    said = done.stderr.strip().splitlines()
    assert said[-1].startswith("flash-mlx: error: ")
    assert "Traceback" not in done.stderr
    assert not any(path.name.startswith((".out", "out")) for path in tmp_path.iterdir())


def everything(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_size for path in folder.rglob("*")}
