"""Which drafter `auto` takes, and what happens where it cannot be had."""

import json
from pathlib import Path
from typing import Any

import pytest

from flash_mlx import registry
from flash_mlx.generate import generate, load
from flash_mlx.loading import with_drafter
from published import publish, table_of

Write = Any


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Make the user's list, and an empty cache."""
    monkeypatch.setenv("FLASH_MLX_CACHE", str(tmp_path / "cache"))

    def write(*entries: object) -> None:
        (tmp_path / "mine.json").write_text(json.dumps({"drafters": entries}))
        monkeypatch.setenv("FLASH_MLX_REGISTRY", str(tmp_path / "mine.json"))

    return write


@pytest.mark.parametrize(
    ("name", "drafter"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", "JLKang/ViSpec-Qwen2.5-VL-7B-Instruct"),
        ("mlx-community/Qwen2.5-VL-7B-Instruct-4bit", "JLKang/ViSpec-Qwen2.5-VL-7B-Instruct"),
        ("mlx-community/llava-1.5-7b-4bit", None),
        ("someone/Qwen2.5-VL-7B-Instruct-4bit", None),
        ("mlx-community/Qwen2.5-VL-7B-Instruct-abliterated-4bit", None),
        ("/some/folder", None),
    ],
)
def test_targets_and_their_conversions_have_their_drafter(name: str, drafter: str | None) -> None:
    found = registry.find(name)
    assert (found.drafter if found else None) == drafter


def test_the_docs_list_what_the_registry_lists() -> None:
    docs = Path(__file__).resolve().parents[2] / "docs" / "drafters.md"
    rows = [line.split("|")[1:4] for line in docs.read_text().splitlines() if "/" in line]
    listed = {tuple(cell.strip(" `") for cell in row) for row in rows if len(row) == 3}
    shipped = json.loads(registry.SHIPPED.read_text())["drafters"]
    assert {(e["target"], e["drafter"], e["kind"]) for e in shipped} <= listed


def test_auto_converts_a_registered_drafter_once(
    tiny_qwen: Path, tmp_path: Path, write: Write
) -> None:
    source = publish(tmp_path / "published", "vispec", table_of(tiny_qwen))
    write({"target": str(tiny_qwen), "drafter": str(source), "kind": "vispec"})
    model = load(tiny_qwen)
    assert (model.draft_kind, model.draft_name) == ("vispec", str(source))
    assert f"registered for {tiny_qwen}" in model.draft_reason
    (converted,) = (tmp_path / "cache" / "drafters").iterdir()
    (source / "model.safetensors").unlink()  # not asked for again
    again = with_drafter(model)
    assert again.draft_kind == "vispec"
    assert generate(again, "What?", max_tokens=3).stats.generation_tokens == 3
    (converted / "config.json").unlink()
    fallen = with_drafter(model)
    assert fallen.draft_kind == "ngram"
    assert "cannot be had" in fallen.draft_reason


def test_a_target_without_a_drafter_is_told_so(tiny_qwen: Path, write: Write) -> None:
    write()
    model = load(tiny_qwen)
    assert model.draft_kind == "ngram"
    assert f"no drafter is known for {tiny_qwen}" in model.draft_reason
    assert with_drafter(model, "none").draft_reason == ""


@pytest.mark.parametrize(
    "entry", [7, {"target": "a", "drafter": "b"}, {"target": "a", "drafter": "b", "kind": "x"}]
)
def test_a_damaged_list_is_refused(write: Write, entry: object) -> None:
    write(entry)
    with pytest.raises(ValueError, match=r"mine\.json"):
        registry.find("a")
