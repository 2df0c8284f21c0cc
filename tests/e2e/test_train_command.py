"""`flash-mlx train` on a tiny target, with pictures made on the spot."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from commands import command, make_drafter, start
from flash_mlx.checkpoint import load_model
from flash_mlx.cli import run
from flash_mlx.targets import LoadedTarget
from flash_mlx.train.answers import AnswerFile
from training import parameters

SMALL = ("--max-tokens", 6, "--batch-size", 2, "--validation-prompts", 1, "--no-bench")
SIZES = ("--set", "drafter.block_size=2", "drafter.num_latents=2", "drafter.intermediate_size=32")


def words(target: Path, data: Path | str, output: Path, *more: object) -> list[str]:
    what = ("train", "--model", target, "--data", data, "--output", output, *SMALL, *SIZES, *more)
    return [str(word) for word in what]


@pytest.fixture(scope="module")
def whole(tiny_llava: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole") / "deep" / "run"
    assert run(words(tiny_llava, pictures, output, "--iters", 4, "--save-every", 2)) == 0
    return output


def test_a_run_leaves_a_drafter_with_its_card(
    whole: Path, tiny_llava: Path, pictures: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    card = (whole / "README.md").read_text()
    config = json.loads((whole / "config.json").read_text())
    assert config["training"]["iterations"] == 4
    assert config["target"]["sha256"] in card
    assert "| examples | 4 |" in card  # two pictures, greedily and sampled; one is held out
    assert (whole / "training.png").read_bytes()[:4] == b"\x89PNG"
    answers = [json.loads(line) for line in (whole / "answers.jsonl").open()]
    assert sorted(row["temperature"] for row in answers) == [0, 0, 1, 1]
    assert len({row["key"] for row in answers}) == 4
    kinds = [json.loads(line)["kind"] for line in (whole / "metrics.jsonl").open()]
    assert kinds.count("validation") == 2
    image = pictures / "0.png"
    answer = ("generate", "--model", tiny_llava, "--image", image, "--max-tokens", 8, "--json")
    assert run([*map(str, answer), "--draft-model", str(whole)]) == 0
    drafted = json.loads(capfd.readouterr().out)
    assert run([*map(str, answer), "--draft-model", "none"]) == 0
    plain = json.loads(capfd.readouterr().out)
    assert drafted["draft_kind"] == "flash"
    assert drafted["token_ids"] == plain["token_ids"]


def test_a_drafter_of_the_most_frequent_tokens(
    whole: Path,
    tiny_llava: Path,
    llava: LoadedTarget,
    pictures: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    output, cache = tmp_path / "run", ("--answer-cache", whole / "answers.jsonl")
    more = (*cache, "--iters", 3, "--draft-vocab", 9)
    assert run(words(tiny_llava, pictures, output, *more)) == 0
    told = "9 of 400: "
    assert f"Tokens that may be drafted: {told}" in capfd.readouterr().err
    assert f"| tokens that may be drafted | {told}" in (output / "README.md").read_text()
    model = load_model(output)
    assert model.config.draft_vocab_size == 9
    rows = [json.loads(line) for line in (whole / "answers.jsonl").open()]
    counts = np.bincount([token for row in rows for token in row["tokens"]], minlength=400)
    counts[list(llava.eos_ids)] = 10**6
    ids = set(np.argsort(-counts, kind="stable")[:9].tolist())
    assert set(model.draft_ids.tolist()) == ids
    image = pictures / "0.png"
    answer = ("generate", "--model", tiny_llava, "--image", image, "--max-tokens", 12, "--json")
    texts = []
    for drafter in (output, "none"):
        fixed = ("--draft-block-size", 2) if drafter == output else ()
        assert run([*map(str, (*answer, "--draft-model", drafter, *fixed))]) == 0
        texts.append(json.loads(capfd.readouterr().out))
    assert texts[0]["token_ids"] == texts[1]["token_ids"]
    assert texts[0]["drafted"] > 0
    assert set(texts[0]["token_ids"]) - ids
    # Who goes on with it keeps its tokens, and may not ask for others.
    line = ["train", "--model", tiny_llava, "--data", pictures, "--output", tmp_path / "on"]
    begun = [*map(str, (*line, *cache, *SMALL, "--iters", 1, "--init-from", output))]
    assert run(begun) == 0
    assert load_model(tmp_path / "on").draft_ids.tolist() == model.draft_ids.tolist()
    assert run([*begun, "--overwrite", "--draft-vocab", "8"]) == 2
    assert "a drafter's sizes are its own" in capfd.readouterr().err


def wait_for(seen: Callable[[], bool]) -> None:
    end = time.monotonic() + 100
    while not seen():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_a_run_that_is_interrupted_and_killed_ends_like_one_that_was_not(
    whole: Path, tiny_llava: Path, pictures: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    line = words(tiny_llava, pictures, output, "--iters", 4, "--save-every", 2)
    answers = output / "answers.jsonl"
    killed = start(*line)
    wait_for(answers.is_file)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    with answers.open("a") as file:
        file.write('{"key": "half')
    stopped = start(*line, "--resume")
    wait_for((output / "training.safetensors").is_file)
    stopped.send_signal(signal.SIGINT)
    _, err = stopped.communicate()
    assert stopped.returncode == 130
    assert "--resume goes on" in err.decode()
    code, _, err = command(*line, "--resume")
    assert code == 0, err
    assert "Going on after step" in err
    ours, theirs = (parameters(load_model(folder)) for folder in (output, whole))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)


def test_folders_of_others_and_of_other_runs_are_refused(
    whole: Path, tiny_llava: Path, pictures: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = (whole / "model.safetensors").read_bytes()

    def refused(output: Path, *more: object) -> str:
        assert run(words(tiny_llava, pictures, output, *more)) == 1
        return capfd.readouterr().err.splitlines()[-1]

    assert "holds a run" in refused(whole)
    assert "began with other iters (4, now 5)" in refused(whole, "--resume", "--iters", 5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "holds notes.txt" in refused(tmp_path / "mine", "--overwrite")
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file", tmp_path / "file" / "deep" / "run"):
        assert f"can be written; {tmp_path / 'file'} is not" in refused(output)
    assert (whole / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (("--init-from", "demo", "--init", "random"), 2, "exclude each other"),
        (("--set", "losses.slot=1"), 2, "got losses.slot"),
        (("--set", "losses.slot_decay=low"), 2, "must be a number"),
        (("--set", "dtype"), 2, "must be name=value"),
        (("--iters", "0"), 2, "--iters must be 1 or more"),
        (("--set", "drafter.num_latents=-1"), 2, "num_latents of a drafter"),
        (("--set", "drafter.hidden_size=8"), 2, "hidden_size is the target's own"),
        (("--set", "drafter.wings=2"), 2, "got wings"),
        (("--set", "betas=5"), 2, "betas must be two numbers from 0 to below 1; got 5"),
        (("--set", "betas=[0.9, 1]"), 2, "betas must be two numbers"),
        (("--set", "compile=maybe"), 2, "compile must be true or false"),
        (("--set", "best_by=luck"), 2, "best_by must be mean_acceptance_length"),
        (("--set", "losses=5"), 2, "got losses"),
        (("--set", "losses.until_fail=2"), 2, "losses.until_fail must be true or false"),
        (("--set", "base_share=1.5"), 2, "base_share must be a share"),
        (("--set", "learning_rate=NaN"), 2, "learning_rate must be a number"),
        (("--report-to", "nobody"), 2, "'nobody' is not 'wandb'"),
        (("--draft-vocab", "0"), 2, "--draft-vocab must be 1 or more"),
        (("--draft-vocab", "401"), 2, "4 to its vocab_size, 400; got 401"),
        (("--set", "order=text_first"), 1, "needs questions with and without pictures"),
    ],
)
def test_wrong_settings_are_named(
    more: tuple[str, ...],
    code: int,
    says: str,
    tiny_llava: Path,
    pictures: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run(words(tiny_llava, pictures, tmp_path / "run", *more)) == code
    assert says in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_dropped_for_one_that_cannot_begin(
    whole: Path, tiny_llava: Path, pictures: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    for more, code in ((("--set", "betas=5"), 2), (("--set", "drafter.wings=2"), 2)):
        assert run(words(tiny_llava, pictures, output, "--overwrite", *more)) == code
    (tmp_path / "empty").mkdir()
    assert run(words(tiny_llava, tmp_path / "empty", output, "--overwrite")) == 1
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before
    assert run(words(tiny_llava, pictures, output, "--overwrite", "--iters", 1)) == 0
    assert json.loads((output / "config.json").read_text())["training"]["iterations"] == 1


def test_a_loss_that_is_no_number_ends_the_run_with_a_line(
    whole: Path, tiny_llava: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output, answers = tmp_path / "run", ("--answer-cache", whole / "answers.jsonl")
    more = ("--learning-rate", 1e30, "--iters", 4, "--set", "max_grad_norm=1e30", "best_by=")
    assert run(words(tiny_llava, pictures, output, *answers, *more)) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("flash-mlx: error: The loss must be a number; it is nan at step 1")
    assert f"(--init-from {output})" in last
    assert all(np.isfinite(value).all() for value in parameters(load_model(output)).values())
    line = ["train", "--model", tiny_llava, "--data", pictures, "--output", tmp_path / "again"]
    more = (*answers, *SMALL, "--iters", 1, "--init-from", output)
    assert run([*map(str, (*line, *more))]) == 0


def test_a_drafter_of_another_target_is_refused(
    tiny_llava: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = make_drafter(tmp_path / "other", hidden_size=32)
    line = ("train", "--model", tiny_llava, "--data", pictures, "--output", tmp_path / "run")
    assert run([*map(str, line), "--init-from", str(other)]) == 1
    assert "must be made for its target" in capfd.readouterr().err


def test_what_cannot_be_used_is_listed(
    tiny_llava: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "rows.jsonl"
    (pictures / "broken.png").write_bytes(b"none")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat " * 9}]
    rows = [{"image": f"{n}.png", "conversations": turns} for n in (0, 1, 2, "broken", "missing")]
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"conversations": turns}]))
    output = tmp_path / "run"
    more = ("--image-folder", pictures, "--answers", "dataset", "--iters", 1)
    assert run(words(tiny_llava, data, output, *more)) == 0
    err = capfd.readouterr().err
    (pictures / "broken.png").unlink()
    skipped = [json.loads(line) for line in (output / "skipped.jsonl").open()]
    assert [row["source"] for row in skipped] == ["rows.jsonl:5", "rows.jsonl:6", "rows.jsonl:4"]
    assert [("does not exist" in row["reason"]) for row in skipped] == [True, False, False]
    assert "Left out 3" in err
    assert "Cut off 2 answers" in err
    assert "| answers cut off | 2 |" in (output / "README.md").read_text()


@pytest.mark.parametrize("names", [(), ("a.png", "b.jpg")])
def test_a_folder_without_good_pictures_is_refused(
    names: tuple[str, ...], tiny_llava: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"")
    assert run(words(tiny_llava, folder, tmp_path / "run")) == 1
    says = "a.png must be a picture; it is empty" if names else "must hold pictures"
    assert says in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_answers_survive(tmp_path: Path) -> None:
    file = AnswerFile(tmp_path / "answers.jsonl", 10)
    file.add("one", {"prompt": "What?"}, (1, 2, 3))
    with (tmp_path / "answers.jsonl").open("a") as stream:
        stream.write('{"key": "two", "tokens": [4')
    again = AnswerFile(tmp_path / "answers.jsonl", 10)
    again.add("three", {}, (5,))
    last = AnswerFile(tmp_path / "answers.jsonl", 10)
    assert [last.get(key) for key in ("one", "two", "three")] == [(1, 2, 3), None, (5,)]
