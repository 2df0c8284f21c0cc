"""`flash-mlx generate` on tiny checkpoints: in a process of its own where that is the point."""

import dataclasses
import io
import itertools
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from commands import command, make_drafter, start
from flash_mlx.cli import run
from flash_mlx.cli.generate import notices
from flash_mlx.generate import GenerationResponse, load, stream_generate
from tiny import build_llava, edit_json, random_image

JSON_KEYS = {
    "text", "token_ids", "finish_reason", "model", "draft_model", "draft_kind", "prompt_tokens",
    "visual_tokens", "latents", "generation_tokens", "rounds", "drafted", "accepted",
    "mean_acceptance_length", "acceptance_rate", "prefill_seconds", "decode_seconds",
    "generation_tps", "peak_memory_gb", "target_gb", "drafter_gb",
    "acceptance_by_position", "accept_lengths",
    "draft_seconds", "verify_seconds", "host_seconds", "parked_rounds",
}  # fmt: skip


@pytest.fixture(scope="session")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_drafter(tmp_path_factory.mktemp("drafter"))


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    random_image().save(path)
    return path


@pytest.fixture(scope="session")
def endless_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target that never stops by itself."""
    folder = tmp_path_factory.mktemp("endless")
    build_llava(folder, max_position_embeddings=100_000)
    edit_json(folder, "config.json", eos_token_id=399)
    edit_json(folder, "generation_config.json", eos_token_id=399)
    return folder


def answer(capfd: pytest.CaptureFixture[str], *words: object) -> dict[str, object]:
    """Run `generate --json` in this process and return the object."""
    code = run(["generate", *map(str, words), "--json"])
    out, err = capfd.readouterr()
    assert code == 0, err
    return json.loads(out)


def test_the_same_text_with_and_without_a_drafter(
    tiny_llava: Path, drafter: Path, picture: Path
) -> None:
    words = ("generate", "--model", tiny_llava, "--image", picture, "--prompt", "What is this?",
             "--max-tokens", 24, "--temperature", 0)  # fmt: skip
    plain_code, plain, plain_err = command(*words, "--draft-model", "none")
    code, text, err = command(*words, "--draft-model", drafter, "--draft-block-size", 3)
    assert (plain_code, code) == (0, 0), plain_err + err
    assert text == plain
    assert len(text) > 10
    assert "Generation: 24 tokens, " in plain_err
    assert "Speculative decoding" not in plain_err
    for part in (
        "Prompt: 30 tokens, ",
        " tokens-per-sec",
        "Peak memory: ",
        "Speculative decoding: ",
        " accepted tokens/round (",
        " tokens per target pass, acceptance ",
        "Rounds by tokens: ",
        "; accepted by slot: ",
        " ms neither (",
        "Image: 16 visual tokens -> 4 latents",
    ):
        assert part in err
    assert "demo" not in err


@pytest.mark.parametrize("family", ["tiny_llava", "tiny_qwen"])
def test_json_holds_the_figures(
    family: str,
    drafter: Path,
    picture: Path,
    capfd: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    model = request.getfixturevalue(family)
    words = ("--model", model, "--prompt", "Describe it.", "--max-tokens", 12, "--temp", 0,
             "--image", picture, picture)  # fmt: skip
    plain = answer(capfd, *words, "--draft-model", "none")
    drafted = answer(capfd, *words, "--draft-model", drafter, "--num-draft-tokens", 2)
    assert plain.keys() == drafted.keys() == JSON_KEYS
    for key in ("text", "token_ids", "finish_reason", "prompt_tokens", "visual_tokens"):
        assert plain[key] == drafted[key]
    assert (plain["draft_kind"], plain["draft_model"], plain["latents"]) == ("none", "none", 0)
    assert (plain["drafted"], plain["mean_acceptance_length"]) == (0, 1)
    assert (drafted["draft_kind"], drafted["draft_model"]) == ("flash", str(drafter))
    assert drafted["latents"] == 8
    assert drafted["visual_tokens"] % 2 == 0
    assert drafted["generation_tokens"] == len(drafted["token_ids"])
    assert drafted["rounds"] <= drafted["drafted"] <= 2 * drafted["rounds"]
    assert drafted["accepted"] <= drafted["drafted"]
    lengths = {int(n): count for n, count in drafted["accept_lengths"].items()}
    assert sum(lengths.values()) == drafted["rounds"]
    assert sum(n * count for n, count in lengths.items()) == drafted["generation_tokens"] - 1
    assert len(drafted["acceptance_by_position"]) == 2
    assert drafted["draft_seconds"] > 0 < drafted["verify_seconds"]
    assert plain["draft_seconds"] is plain["host_seconds"] is None


@pytest.mark.parametrize("family", ["tiny_llava", "tiny_qwen"])
def test_drafts_from_the_text_so_far_are_the_default_and_change_nothing(
    family: str, picture: Path, capfd: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(family)
    words = ("generate", "--model", model, "--prompt", "a b c a b c a b", "--max-tokens", 60,
             "--temp", 0, "--image", picture, picture, "--json",
             "--draft-block-size", 8)  # fmt: skip
    said = {}
    for drafter in ("none", "ngram", "auto"):
        assert run([*map(str, words), "--draft-model", drafter]) == 0
        out, err = capfd.readouterr()
        assert len(err.splitlines()) == (1 if drafter == "auto" else 0)
        assert ("ngram" in err) == (drafter == "auto")
        said[drafter] = json.loads(out)
    assert said["ngram"]["token_ids"] == said["none"]["token_ids"] == said["auto"]["token_ids"]
    for drafter in ("ngram", "auto"):
        assert (said[drafter]["draft_model"], said[drafter]["draft_kind"]) == ("ngram", "ngram")
        assert said[drafter]["latents"] == 0
        assert said[drafter]["drafted"] >= said[drafter]["accepted"] > 0


def test_the_answer_depends_on_the_picture_and_needs_none(
    tiny_llava: Path, tmp_path: Path, picture: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    white = tmp_path / "white.png"
    Image.new("RGB", (64, 64), "white").save(white)
    words = ("--model", tiny_llava, "--prompt", "What?", "--max-tokens", 16, "--temp", 0)
    texts = {answer(capfd, *words, "--image", file)["text"] for file in (picture, white)}
    without = answer(capfd, *words)
    assert len(texts | {without["text"]}) == 3
    assert (without["visual_tokens"], without["latents"]) == (0, 0)
    with_system = answer(capfd, *words, "--system", "Answer in one word.")
    assert with_system["prompt_tokens"] > without["prompt_tokens"]


def test_a_prompt_comes_from_stdin(tiny_llava: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ("--model", tiny_llava, "--max-tokens", 8, "--temp", 0)
    piped = ("generate", *words, "--prompt", "-", "--json")
    code, out, err = command(*piped, stdin="Wie groß?\n".encode())
    assert code == 0, err
    expected = answer(capfd, *words, "--prompt", "Wie groß?")
    assert json.loads(out)["token_ids"] == expected["token_ids"]
    code, out, err = command(*piped, stdin=b"caf\xe9")
    assert (code, out) == (1, b"")
    assert "UTF-8" in err


def test_a_seed_repeats_a_sampled_text(
    tiny_llava: Path, drafter: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("--model", tiny_llava, "--draft-model", drafter, "--prompt", "Say something.",
             "--max-tokens", 24, "--temperature", 0.9, "--top-p", 0.95, "--top-k", 50,
             "--min-p", 0.01)  # fmt: skip
    one, two, again = (answer(capfd, *words, "--seed", seed)["text"] for seed in (1, 2, 1))
    assert one == again != two


def test_penalties_and_biases_reach_the_text(
    tiny_llava: Path, drafter: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("--model", tiny_llava, "--prompt", "Hello.", "--max-tokens", 40, "--temp", 0)

    def says(*penalties: object) -> list[int]:
        plain = answer(capfd, *words, "--draft-model", "none", *penalties)["token_ids"]
        assert answer(capfd, *words, "--draft-model", drafter, *penalties)["token_ids"] == plain
        return plain

    free = says()
    for name in ("repetition", "presence", "frequency"):  # of a text that repeats itself
        assert says(f"--{name}-penalty", 2) != free
        assert says(f"--{name}-penalty", 2, f"--{name}-context-size", 3) == free
    banned = says("--logit-bias", f"{free[0]}=-inf", "--logit-bias", f"{free[1]}=-100")
    assert not {*free[:2]} & {*banned}
    # A bias for a token that the model does not have is known once the model is.
    assert run(["generate", *map(str, words), "--logit-bias", "1000=1"]) == 1
    assert "400 tokens" in capfd.readouterr().err


def test_unusual_pictures_work(
    tiny_llava: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    picture = random_image()
    frames = [Image.new("P", (20, 20), shade) for shade in (0, 9)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    for name, image in {
        "dot.png": random_image(1, 1),
        "large.jpg": random_image(4800, 3203),
        "wide.png": random_image(400, 10),
        "tall.png": random_image(10, 400),
        "grey.png": picture.convert("L"),
        "palette.png": picture.convert("P"),
        "deep.png": picture.convert("I;16"),
        "clear.png": picture.convert("RGBA"),
        "print.jpg": picture.convert("CMYK"),
    }.items():
        image.save(tmp_path / name)
    files = sorted(tmp_path.iterdir())
    got = answer(capfd, "--model", tiny_llava, "--max-tokens", 2, "--image", *files)
    assert got["visual_tokens"] == 16 * len(files) == 160


def test_text_streams(tiny_llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Terminal(io.StringIO):
        def flush(self) -> None:
            shown.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Terminal())
    assert (
        run(["generate", "--model", str(tiny_llava), "--prompt", "Hi.", "--max-tokens", "20"]) == 0
    )
    assert len(set(shown)) > 10
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(shown))


def test_an_error_in_the_midst_of_a_text_gets_a_line_of_its_own(
    tiny_llava: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def break_off(*words: Any, **settings: Any) -> Iterator[GenerationResponse]:
        pieces = stream_generate(*words, **settings)
        yield next(pieces)
        yield next(pieces)
        raise ValueError("no more")

    monkeypatch.setattr(sys.modules["flash_mlx.generate"], "stream_generate", break_off)
    assert run(["generate", "--model", str(tiny_llava), "--prompt", "Hi.", "--temp", "0"]) == 1
    out, err = capfd.readouterr()
    assert out.endswith("\n")
    assert err.endswith("flash-mlx: error: no more\n")


def test_the_demo_says_which_drafter_it_has(tiny_llava: Path) -> None:
    model = dataclasses.replace(load(tiny_llava, "none"), is_demo=True)
    (without,) = notices(model, "none")
    (own,) = notices(dataclasses.replace(model, draft_name="demo", draft_kind="flash"), "auto")
    assert "drafter" not in without
    assert "bundled demo model with its own drafter" in own


def test_an_interrupt_leaves_what_was_said(endless_llava: Path, drafter: Path) -> None:
    process = start("generate", "--model", endless_llava, "--draft-model", drafter,
                    "--prompt", "Go on.", "--max-tokens", 90_000)  # fmt: skip
    first = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(first) == 20
    assert rest.endswith(b"\n")
    assert "Traceback" not in err.decode()
    assert "Generation: " in err.decode()


def test_a_reader_that_leaves_is_no_error_message(endless_llava: Path) -> None:
    process = start("generate", "--model", endless_llava, "--prompt", "Go on.", "--no-verbose",
                    "--draft-model", "none", "--max-tokens", 90_000)  # fmt: skip
    assert process.stdout.read(20)
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr.read() == b""
