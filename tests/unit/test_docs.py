"""The pages: their examples run, and what they link to is there."""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_the_examples_of_the_python_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, Any] = {"picture": ROOT / "examples" / "images" / "scene_1006.png"}
    for block in blocks:
        exec(block, names)  # the page is this project's own
    assert names["drawing"].format is None
    assert names["drawing"]._repr_png_()[:4] == b"\x89PNG"  # what notebooks ask for
    assert (tmp_path / "latents.png").exists()
    assert (tmp_path / "captions.jsonl").read_text().count("\n") == 2
    out = capsys.readouterr().out
    assert "gone.png A picture must be a file" in out
    assert int(re.findall(r"(\d+) rows were not read again", out)[0]) > 100


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_flags_that_the_pages_name_exist() -> None:
    known = "".join(file.read_text() for file in (ROOT / "flash_mlx" / "cli").glob("*.py"))
    for page in PAGES:
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text(encoding="utf-8")):
            assert f'"{flag}' in known or f"/{flag}" in known or flag in ELSEWHERE, (page, flag)


# Of pip, of the scripts in `examples`, or of click itself.
ELSEWHERE = {
    "--count",
    "--output",
    "--clips",
    "--help",
    "--folder",
    "--pictures",
    "--questions",
    "--sizes",
}
