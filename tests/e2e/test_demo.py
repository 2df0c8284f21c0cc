"""The bundled demo, as a newcomer meets it."""

import json
from pathlib import Path

import pytest

from commands import command
from flash_mlx.loading import DEMO
from tiny import random_image

pytestmark = pytest.mark.skipif(
    not (DEMO / "target" / "config.json").is_file() or not (DEMO / "drafter").is_dir(),
    reason="this tree has no demo",
)


@pytest.mark.slow
def test_the_demo_describes_any_picture_and_says_what_it_is(tmp_path: Path) -> None:
    picture = tmp_path / "photograph.jpg"
    random_image(640, 480).save(picture)
    words = ("generate", "--image", picture, "--max-tokens", 24, "--temperature", 0, "--json")
    code, out, err = command(*words)
    plain_code, plain, _ = command(*words, "--draft-model", "none")
    assert (code, plain_code) == (0, 0), err
    drafted, undrafted = json.loads(out), json.loads(plain)
    assert drafted["token_ids"] == undrafted["token_ids"]
    assert (drafted["model"], drafted["draft_model"], drafted["draft_kind"]) == (
        "demo",
        "demo",
        "flash",
    )
    assert drafted["visual_tokens"] >= 256 > drafted["latents"] > 0
    assert drafted["mean_acceptance_length"] > 1
    assert len(err.splitlines()) == 1
    assert "demo" in err
    assert "drawn scenes" in err
