"""The demo's drafter inside mlx-vlm itself, which knows nothing of flash-mlx."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from flash_mlx.checkpoint import load_model, save_drafter
from flash_mlx.cli import run
from flash_mlx.draft import FlashModel
from flash_mlx.loading import DEMO, demo_pictures
from flash_mlx.processing import make_prompt
from flash_mlx.targets import LoadedTarget, load_target
from identity import mlx_vlm_ids

pytestmark = pytest.mark.skipif(
    not (DEMO / "target" / "config.json").is_file() or not (DEMO / "drafter").is_dir(),
    reason="this tree has no demo",
)


def export(source: str, folder: Path) -> Path:
    words = ["convert", "--hf-path", source, "--export", "mlx-vlm", "--mlx-path", str(folder)]
    assert run(words) == 0
    return folder


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    return export("demo", tmp_path / "exported")


def test_mlx_vlms_own_loop_says_the_same_with_the_demos_drafter_in_fewer_passes(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mlx-vlm's input preparation refuses LLaVA's images, so it gets the prompt's arrays."""
    from mlx_vlm.speculative.drafters import load_drafter, validate_drafter_compatibility

    files = {"config.json", "flash_drafter.py", "model.safetensors"}
    assert {file.name for file in exported.iterdir()} == files
    loaded = load_target(DEMO / "target")
    drafter, kind = load_drafter(str(exported))
    validate_drafter_compatibility(loaded.target.model, drafter, kind)
    for image in sorted(DEMO.parents[1].glob("examples/images/*.png"))[:2]:
        prompt = make_prompt(loaded, "Describe this image in detail.", [image])
        plain = mlx_vlm_ids(loaded, prompt, 40, monkeypatch)
        drafted = mlx_vlm_ids(loaded, prompt, 40, monkeypatch, draft_model=drafter, draft_kind=kind)
        assert drafted == plain
        assert sum(drafter.accept_lens) > len(drafter.accept_lens) >= 2
        assert len(drafter.accept_lens) < 30
        assert drafter._rounds._drafter.model.config.block_size == drafter.config.block_size - 1


def test_a_drafter_of_some_tokens_proposes_no_others_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_vlm.speculative.drafters import load_drafter, validate_drafter_compatibility

    whole, ids = load_model(DEMO / "drafter"), mx.arange(2, 502, 2, dtype=mx.int32)
    model = FlashModel(replace(whole.config, draft_vocab_size=250))
    model.update({**whole.parameters(), "draft_ids": ids})
    save_drafter(model, tmp_path / "some", {})
    drafter, kind = load_drafter(str(export(str(tmp_path / "some"), tmp_path / "exported")))
    loaded = load_target(DEMO / "target")
    validate_drafter_compatibility(loaded.target.model, drafter, kind)
    prompt = make_prompt(loaded, "Describe this image in detail.", [demo_pictures()[0]])
    plain = mlx_vlm_ids(loaded, prompt, 20, monkeypatch)
    drafted = mlx_vlm_ids(loaded, prompt, 20, monkeypatch, draft_model=drafter, draft_kind=kind)
    assert drafted == plain
    assert set(drafter._rounds._drafted) <= set(ids.tolist())
    assert drafter._rounds._drafter.head_bytes == 4 * 250 * 192


def test_a_target_of_another_size_is_refused(exported: Path, llava: LoadedTarget) -> None:
    from mlx_vlm.speculative.drafters import load_drafter, validate_drafter_compatibility

    drafter, kind = load_drafter(str(exported))
    with pytest.raises(ValueError, match=r"hidden_size of 192, the target's is 64"):
        validate_drafter_compatibility(llava.target.model, drafter, kind)


@pytest.mark.parametrize(
    "more", [["-q"], ["--dtype", "float16"], ["--target", "x"], ["--upload-repo", "a/b"]]
)
def test_an_export_takes_no_settings_of_a_conversion(
    more: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", "--hf-path", "demo", "--export", "mlx-vlm"]
    assert run([*words, "--mlx-path", str(tmp_path / "out"), *more]) == 2
    assert "takes no --" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_mlx_vlms_command_takes_the_folder(exported: Path) -> None:
    words = [sys.executable, "-m", "mlx_vlm.generate", "--model", DEMO / "target", "--verbose"]
    words += ["--prompt", "What is red?", "--max-tokens", "16", "--temperature", "0"]
    said = []
    for more in ([], ["--draft-model", exported]):
        done = subprocess.run(
            [*map(str, words), *map(str, more)],
            capture_output=True,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    plain, drafted = (text.split("Generation:")[0].split("=" * 10)[1:-1] for text in said)
    assert plain == drafted
    assert plain
    assert "Speculative decoding:" in said[1]
    assert "Speculative decoding:" not in said[0]
