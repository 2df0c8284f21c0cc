"""The bundled demo, as a newcomer meets it."""

import json
from pathlib import Path
from typing import Any

import pytest

from commands import command
from flash_mlx.cost import Costs
from flash_mlx.decode import NoDrafter
from flash_mlx.draft import NgramDrafter
from flash_mlx.draft.adaptive import paced, unpaced
from flash_mlx.generate import Model, load
from flash_mlx.loading import DEMO, demo_pictures
from flash_mlx.penalties import Penalties
from flash_mlx.processed import processed
from flash_mlx.processing import make_prompt
from identity import SHAPES, CorruptedOracle, run
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


@pytest.fixture(scope="module")
def demo() -> Model:
    return load("demo", drafting="fixed")


FREE = Costs(1.0, ((1, 1.0), (16, 1.01)), ((1, 0.01), (10, 0.02)))
MIDDLING = Costs(1.0, ((1, 1.05), (4, 1.6), (12, 3.6)), ((1, 0.1), (10, 0.2)))


@pytest.mark.parametrize(
    "penalties",
    [
        Penalties(),
        pytest.param(
            Penalties(repetition_penalty=1.1, presence_penalty=0.2), marks=pytest.mark.slow
        ),
    ],
    ids=["free", "penalised"],
)
def test_however_it_drafts_the_demo_says_its_plain_text(demo: Model, penalties: Penalties) -> None:
    target = processed(demo.target, penalties)
    prompt = make_prompt(demo.loaded, "Describe the image in detail.", [demo_pictures()[0]])
    expected, *_ = run(target, NoDrafter(), prompt, 60)
    own = unpaced(demo.drafter)
    drafters: dict[str, Any] = {
        shape: CorruptedOracle(tuple(expected), topology, target.vocab_size)
        for shape, topology in SHAPES.items()
    }
    drafters |= {"block": own, "ngram": NgramDrafter()}
    for name, costs in (("free", FREE), ("middling", MIDDLING)):
        drafters[name] = paced(own, lambda _, greedy, c=costs: c, lookup=NgramDrafter())
    for name, drafter in drafters.items():
        ids, accepted, rejected = run(target, drafter, prompt, 60)
        assert ids == expected, name
        assert accepted >= (1 if name == "ngram" else 15), name
        assert rejected > 0 or name in ("block", "free", "middling"), name
