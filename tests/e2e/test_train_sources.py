"""Where `flash-mlx train` learns from besides pictures: use, tables, kept states; and reports."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from commands import command
from fake_hub import serving
from flash_mlx.checkpoint import load_model
from flash_mlx.cli import run
from flash_mlx.train import features
from flash_mlx.train.features import FeatureCache
from flash_mlx.train.source import find_questions
from flash_mlx.train.traffic import TRAFFIC, TrafficLog
from tiny import build_llava
from training import example, parameters

SIZES = ("--set", "drafter.block_size=2", "drafter.num_latents=2", "drafter.intermediate_size=32")


def words(target: Path, output: Path, *more: object) -> list[str]:
    what = ("train", "--model", target, "--output", output, "--max-tokens", 6, "--batch-size", 2)
    return [*map(str, (*what, "--validation-prompts", 1, "--no-bench", *SIZES, *more))]


def test_a_drafter_learns_from_what_a_model_was_asked(
    tiny_llava: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, log = tmp_path / "use", tmp_path / "use" / TRAFFIC
    plain = ("--model", tiny_llava, "--draft-model", "none", "--max-tokens", 6)
    asked = ("generate", *plain, "--image", pictures / "0.png", "--prompt", "What?", "--json")
    assert run([*map(str, asked)]) == 0
    assert not folder.exists()
    wanted = json.loads(capfd.readouterr().out)["token_ids"]
    for _ in range(2):
        assert run([*map(str, asked), "--learn", str(folder)]) == 0
    caption = ("caption", pictures, "-o", tmp_path / "captions.jsonl", *plain, "--learn", folder)
    assert run([*map(str, caption)]) == 0
    code, _, err = command(
        "chat", *plain, "--image", pictures / "1.png", "--learn", folder, stdin=b"What?\nWhy?\n"
    )
    assert code == 0, err
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["answer"] for row in rows[:2]] == [wanted, wanted]
    assert len(rows) == 2 + 3 + 2
    assert {row["inputs"] for row in rows} == {file.stem for file in folder.glob("*.safetensors")}
    assert len(rows[-1]["tokens"]) > len(rows[-2]["tokens"])  # the second turn has the first in it
    assert log.stat().st_mode & 0o077 == 0
    with log.open("a") as stream:
        stream.write('{"target": "another"}\n{"half')
    output = tmp_path / "run"
    assert run(words(tiny_llava, output, "--from-traffic", folder, "--iters", 2)) == 0
    card = (output / "README.md").read_text()
    # Of six different ones, those of one picture are held out.
    assert re.search(r"\| answers collected in use \| [345] \|", card)
    assert "| left out | 2 |" in card
    assert "another target said it" in (output / "skipped.jsonl").read_text()
    assert parameters(load_model(output))
    other = build_llava(tmp_path / "other", seed=5)
    assert run(words(other, tmp_path / "run2", "--from-traffic", folder)) == 1
    assert "nothing in" in capfd.readouterr().err
    assert run(words(other, tmp_path / "run2", "--from-traffic", pictures)) == 1
    assert "it has no traffic.jsonl" in capfd.readouterr().err


ADD = """
import sys, pathlib, flash_mlx
sys.path.insert(0, sys.argv[2])
from training import example
from flash_mlx.train.traffic import TrafficLog
log = TrafficLog(pathlib.Path(sys.argv[1]), 1 << 20, "x")
for seed in range(int(sys.argv[3]), int(sys.argv[3]) + 40):
    one = example(seed, 200, 5)
    log(one.prompt, one.answer)
"""


def test_two_processes_collect_at_once_and_a_half_line_is_cut_off(tmp_path: Path) -> None:
    tests = Path(__file__).parent.parent
    TrafficLog(tmp_path, 1 << 20, "x")
    (tmp_path / TRAFFIC).write_text('{"target": "x", "tok')
    both = [
        subprocess.Popen([sys.executable, "-c", ADD, tmp_path, tests, str(start)])
        for start in (0, 1000)
    ]
    assert [each.wait() for each in both] == [0, 0]
    rows = [json.loads(line)["tokens"] for line in (tmp_path / TRAFFIC).open()]
    wanted = [list(example(s, 200, 5).prompt.tokens) for s in (*range(40), *range(1000, 1040))]
    assert sorted(rows) == sorted(wanted)


def test_what_is_collected_never_outgrows_its_bound(tmp_path: Path) -> None:
    log = TrafficLog(tmp_path, 3000, "x")
    one = example(0, 60, 5)
    while log.is_open:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            log(one.prompt, one.answer)
    assert "nothing more is collected" in str(said[-1].message)
    log(one.prompt, one.answer)
    assert 2000 < sum(file.stat().st_size for file in tmp_path.iterdir()) <= 3000


def data_set(pictures: Path, form: str) -> list[dict[str, object]]:
    content = [(pictures / f"{n}.png").read_bytes() for n in range(3)]
    if form == "messages":
        turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]
        return [{"images": [{"bytes": c, "path": None}], "messages": turns} for c in content]
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    return [{"image": {"bytes": c, "path": None}, "conversations": turns} for c in content]


@pytest.mark.parametrize("form", ["messages", "conversations"])
@pytest.mark.parametrize("kind", ["pictures", "bytes"])
def test_rows_of_tables_hold_their_pictures(
    form: str,
    kind: str,
    tiny_llava: Path,
    pictures: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(data_set(pictures, form))
    if kind == "pictures":
        name, feature = ("image", datasets.Image())
        if form == "messages":
            name, feature = "images", datasets.List(datasets.Image())
        table = table.cast_column(name, feature)
    (tmp_path / "set").mkdir()
    table.to_parquet(str(tmp_path / "set" / "train.parquet"))
    output = tmp_path / "run"
    more = ("--data", tmp_path / "set", "--answers", "dataset", "--iters", 1)
    assert run(words(tiny_llava, output, *more)) == 0
    assert "| questions | 3 |" in (output / "README.md").read_text()
    assert run(words(tiny_llava, tmp_path / "none", *more, "--split", "test")) == 1
    assert "must have a split 'test'" in capfd.readouterr().err


@pytest.mark.slow
def test_data_sets_come_from_the_hub(tiny_llava: Path, pictures: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pets, script = tmp_path / "pets", tmp_path / "script"
    table = datasets.Dataset.from_list(data_set(pictures, "messages"))
    table = table.cast_column("images", datasets.List(datasets.Image()))
    for folder in (pets, script):
        (folder / "data").mkdir(parents=True)
        (folder / "README.md").write_text("---\nlicense: mit\n---\n")
        table.to_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))
    (script / "script.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    sets = {"datasets/org/pets": {"main": pets}, "datasets/org/script": {"main": script}}
    with serving(sets) as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
        settings |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
        said = {}
        for name in ("pets", "script", "none"):
            more = ("--data", f"org/{name}", "--answers", "dataset", "--iters", 1)
            line = words(tiny_llava, tmp_path / name / "run", *more)
            said[name] = command(*line, environment=settings)
    assert said["pets"][0] == 0, said["pets"][2]
    assert "| questions | 3 |" in (pets / "run" / "README.md").read_text()
    for name in ("script", "none"):
        code, _, err = said[name]
        assert code == 1
        assert "no data set of that id could be had: " in err.splitlines()[-1]
    assert not (tmp_path / "ran").exists()


def test_states_are_kept_and_read_again(
    tiny_llava: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = ("--data", pictures, "--iters", 3, "--answer-cache", tmp_path / "answers.jsonl")
    kept = ("--cache-features", tmp_path / "kept", "--cache-dtype", "float32")
    assert run(words(tiny_llava, tmp_path / "plain", *line)) == 0
    assert run(words(tiny_llava, tmp_path / "first", *line, *kept)) == 0
    assert "states of 4 answers take" in capfd.readouterr().err
    shards = {file: file.stat().st_mtime_ns for file in (tmp_path / "kept").iterdir()}
    assert run(words(tiny_llava, tmp_path / "second", *line, *kept)) == 0
    assert "states of 0 answers take 0.0 MB" in capfd.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "kept").iterdir()} == shards
    plain, first, second = (
        parameters(load_model(tmp_path / name)) for name in ("plain", "first", "second")
    )
    for name in plain:
        assert np.array_equal(plain[name], first[name])
        assert np.array_equal(plain[name], second[name])


def test_a_cache_goes_on_where_it_stopped_and_says_what_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = [example(seed, 4, 3) for seed in range(5)]
    seen = []

    def read(one: object) -> mx.array:
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(one)
        return mx.full((7, 10), len(seen) / 10)

    monkeypatch.setattr(features, "SHARD_BYTES", 100)  # each fills a shard
    cache = FeatureCache(tmp_path, "float16", 10)
    assert cache.size(examples) == 5 * 7 * 10 * 2
    with pytest.raises(KeyboardInterrupt):
        cache.fill(examples, read)
    again = FeatureCache(tmp_path, "float16", 10)
    assert again.missing(examples) == examples[3:]
    assert FeatureCache(tmp_path, "float32", 10).missing(examples) == examples
    np.testing.assert_allclose(again.get(examples[1], mx.float32)[:, 0], 0.2, rtol=1e-3)
    assert again.get(examples[1], mx.float32).dtype == mx.float32
    with pytest.raises(OSError, match="The disk must hold the target's states"):
        again.require_room(1 << 60)
    with pytest.raises(ValueError, match="must be finite numbers; as float16"):
        again.fill(examples[3:], lambda _: mx.full((7, 4), 1e6))


def test_runs_that_share_a_folder_keep_each_others_states(tmp_path: Path) -> None:
    examples = [example(seed, 4, 3) for seed in range(3)]

    def read(one: object) -> mx.array:
        return mx.full((7, 10), examples.index(one) / 4)  # type: ignore[arg-type]

    first, second = (FeatureCache(tmp_path, "float32", 10) for _ in range(2))
    first.fill(examples[:2], read)
    second.fill([examples[0], examples[2]], read)
    for cache, numbers in ((first, (0, 1)), (second, (0, 2))):
        for number in numbers:
            assert (cache.get(examples[number], mx.float32) == number / 4).all()
    assert not FeatureCache(tmp_path, "float32", 10).missing(examples)


@pytest.mark.parametrize("name", ["video", "videos"])
def test_no_row_of_a_table_names_a_file_of_this_machine(name: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    clip = tmp_path / "private.mp4"
    clip.write_bytes(b"mine")
    turns = [{"role": "user", "content": "What?"}]
    named: object = str(clip) if name == "video" else [str(clip)]
    table = datasets.Dataset.from_list([{name: named, "messages": turns}])
    table.to_parquet(str(tmp_path / "rows.parquet"))
    found = find_questions(str(tmp_path / "rows.parquet"))
    assert not found.questions
    assert "videos are not read" in found.skipped[0][1]


@pytest.mark.slow
def test_training_is_reported_to_wandb(tiny_llava: Path, pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    line = words(tiny_llava, tmp_path / "run", "--data", pictures, "--iters", 2)
    quiet = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    code, _, err = command(*line, "--report-to", "wandb", environment=quiet)
    assert code == 0, err
    (log,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    content = log.read_bytes()
    assert b"train/train_loss" in content
    assert b"validation/mean_acceptance_length" in content


def test_a_report_that_nobody_can_take_is_refused_at_once(
    tiny_llava: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    line = words(tiny_llava, tmp_path / "run", "--data", pictures, "--report-to", "wandb")
    assert run(line) == 2
    assert "pip install 'flash-mlx[wandb]'" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_drafter_with_taps_is_trained_and_drafts(
    tiny_llava: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    line = words(tiny_llava, output, "--data", pictures, "--iters", 3)
    assert run([*line, "--set", "drafter.taps=true", "rollout=1", "best_by="]) == 0
    assert json.loads((output / "config.json").read_text())["taps"] is True
    assert parameters(load_model(output))["fc_taps.weight"].any()
    capfd.readouterr()
    ids = []
    for drafter in (output, "none"):
        say = ("generate", "--model", tiny_llava, "--draft-model", drafter, "--json")
        more = ("--image", pictures / "0.png", "--max-tokens", 12, "--temperature", 0)
        more += () if drafter == "none" else ("--draft-block-size", 2)
        assert run([*map(str, (*say, *more))]) == 0
        ids.append(json.loads(capfd.readouterr().out))
    assert ids[0]["token_ids"] == ids[1]["token_ids"]
    assert ids[0]["drafted"] > 0
    assert run(["convert", "--export", "mlx-vlm", "--hf-path", str(output), "--mlx-path", "x"]) == 1
    assert "has taps" in capfd.readouterr().err
