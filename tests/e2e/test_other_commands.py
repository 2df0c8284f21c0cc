"""`flash-mlx convert`, `doctor` and the group itself."""

import json
import resource
import shutil
import subprocess
from pathlib import Path

import mlx.core as mx
import pytest

from commands import FLASH_MLX
from flash_mlx.cli import run
from flash_mlx.generate import generate, load
from tiny import edit_json, random_image


def test_help_answers_at_once_and_lists_what_there_is() -> None:
    def seconds() -> float:
        """Processor time of finished processes: it does not depend on what else runs here."""
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = seconds()
    done = subprocess.run([FLASH_MLX, "--help"], capture_output=True, text=True, check=True)
    assert seconds() - before < 0.3
    for command in ("generate", "convert", "doctor"):
        assert f"\n  {command} " in done.stdout


def test_doctor_says_what_computes(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["row_cost"].keys() == {"1", "2", "4", "8", "16"}
    assert report["row_cost"]["1"] == 1
    assert report["versions"]["mlx"]
    assert report["backend"] in ("Metal", "CUDA", "CPU")
    assert run(["doctor"]) == 0
    text = capfd.readouterr().out
    assert report["blas"]["name"] in text
    assert "Row cost   1: 1.00" in text


def test_converted_targets_say_the_same(
    tiny_llava: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    converted = tmp_path / "deep" / "converted"
    assert run(["convert", "--hf-path", str(tiny_llava), "--mlx-path", str(converted)]) == 0
    assert capfd.readouterr().out == ""
    settings = {"max_tokens": 16, "temperature": 0.0}
    before, after = (
        generate(load(path, "none"), "What?", random_image(), **settings).token_ids
        for path in (tiny_llava, converted)
    )
    assert before == after
    assert [file.name for file in converted.parent.iterdir()] == ["converted"]


def test_quantised_targets_load(
    tiny_llava: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "quantised"
    folder.mkdir()
    words = ["--hf-path", str(tiny_llava), "--mlx-path", str(folder), "--dtype", "float16"]
    assert run(["convert", *words, "-q", "--q-bits", "8", "--q-group-size", "32"]) == 0
    config = json.loads((folder / "config.json").read_text())
    assert (config["quantization"]["bits"], config["quantization"]["group_size"]) == (8, 32)
    sizes = []
    for more in ([], ["--keep-quantized"]):
        words = ["generate", "--model", str(folder), "--prompt", "What?", "--max-tokens", "4"]
        capfd.readouterr()
        assert run([*words, "--json", *more]) == 0
        sizes.append(json.loads(capfd.readouterr().out)["target_gb"])
    if mx.default_device() == mx.Device(mx.cpu):
        assert sizes[1] < 0.7 * sizes[0]
    again = ["--hf-path", str(tiny_llava), "--mlx-path", str(folder)]
    assert run(["convert", *again]) == 1  # not over what is there


def test_a_conversion_that_fails_leaves_nothing(
    tiny_llava: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("broken", "unfit"):
        (tmp_path / name).mkdir()
    for file in tiny_llava.iterdir():
        (tmp_path / "broken" / file.name).write_bytes(file.read_bytes()[:1000])
        (tmp_path / "unfit" / file.name).write_bytes(file.read_bytes())
    edit_json(tmp_path / "unfit", "config.json", vision_config=[])
    for source, target in (
        ("broken", "result"),
        ("missing", "result"),
        ("unfit", "result"),
        ("unfit", "unfit/inside"),
    ):
        words = ["--hf-path", str(tmp_path / source), "--mlx-path", str(tmp_path / target)]
        assert run(["convert", *words]) == 1
        err = capfd.readouterr().err
        assert "flash-mlx: error: " in err
        assert source in err
        assert "FLASH_MLX_DEBUG" not in err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["broken", "unfit"]
    assert not (tmp_path / "unfit" / "inside").exists()


def test_a_conversion_takes_neither_code_nor_subfolders_along(
    tiny_llava: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_llava, tmp_path / "source")
    (source / "modeling.py").write_text("raise SystemExit")
    (source / "onnx").mkdir()
    (source / "onnx" / "model.py").touch()
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    converted = tmp_path / "converted"
    assert run(["convert", "--hf-path", str(source), "--mlx-path", str(converted)]) == 0
    assert not list(converted.rglob("*.py"))
    assert not (converted / "onnx").exists()
    assert (source / "onnx" / "model.py").exists()


def test_a_conversion_executes_no_code_of_the_checkpoint(
    tiny_llava: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(tiny_llava, tmp_path / "source")
    witness = tmp_path / "executed"
    (source / "evil.py").write_text(f"open({str(witness)!r}, 'w')\n")
    edit_json(source, "config.json", model_file="evil.py")
    words = ["--hf-path", str(source), "--mlx-path", str(tmp_path / "result")]
    assert run(["convert", *words]) == 1
    assert "'evil.py' as model_file" in capfd.readouterr().err
    assert not witness.exists()
