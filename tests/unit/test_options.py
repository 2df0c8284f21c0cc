"""Lists of values on the command line."""

from pathlib import Path

import pytest

from flash_mlx.cli import run
from flash_mlx.cli.options import spread


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--image a b --seed 1", "--image a --image b --seed 1"),
        ("--image a --image b", "--image a --image b"),
        ("--image=a b c", "--image=a --image b --image c"),
        ("--prompt - --image a b", "--prompt - --image a --image b"),
        ("--image a b -h x", "--image a --image b -h x"),
        ("--image -a b", "--image -a --image b"),
        ("--image", "--image"),
        ("--seed 1 a", "--seed 1 a"),
    ],
)
def test_each_value_of_a_list_gets_its_option(line: str, expected: str) -> None:
    assert spread(line.split(), ["--image"]) == expected.split()


@pytest.mark.parametrize("model", ["demo", "{here}"])
@pytest.mark.parametrize(
    "words",
    [
        "generate --prompt Why? --model",
        "caption a.png -o {here}/out.jsonl --model",
        "bench --model",
        "train --plan --model",
        "convert --mlx-path {here}/out --hf-path",
    ],
)
def test_only_models_of_the_hub_have_revisions(
    words: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"{words} {model} --revision main".replace("{here}", str(tmp_path))
    assert run(line.split()) == 2
    assert "--revision must name a revision of a model on the hub" in capsys.readouterr().err
