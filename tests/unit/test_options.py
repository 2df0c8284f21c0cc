"""Lists of values on the command line."""

import pytest

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
