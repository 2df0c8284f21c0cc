"""The harness counts what was said and times nobody unfairly."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx_vlm
import numpy as np
import pytest

from flash_mlx import bench, cli, measure
from flash_mlx.bench import answers, compare
from flash_mlx.bench.answers import answer
from flash_mlx.bench.figures import Asked, Sample
from flash_mlx.bench.macs import projections
from flash_mlx.decode import NoDrafter
from flash_mlx.draft import FlashConfig, FlashModel
from flash_mlx.draft.drafter import FlashDrafter
from flash_mlx.generate import load
from flash_mlx.processing import make_prompt
from flash_mlx.prompt import Prompt
from flash_mlx.targets import LoadedTarget
from tiny import random_image

KEYS = {
    "drafter", "temperature", "samples", "tokens", "generation_tps", "speedup", "speedup_low",
    "speedup_high", "end_to_end_speedup", "ttft_ratio", "latency_p50", "latency_p95",
    "mean_acceptance_length", "accepted_per_round", "acceptance_by_position", "draft_seconds",
    "verify_seconds", "host_seconds", "peak_memory_gb", "identical", "first_divergence", "error",
}  # fmt: skip


class Broken(NoDrafter):
    """Fails as a drafter with a bug would."""

    def draft(self, *_: object) -> None:  # type: ignore[override]
        raise LookupError("no idea")


@pytest.fixture(scope="module")
def prompts(llava: LoadedTarget) -> list[Prompt]:
    return [make_prompt(llava, "Hi", [random_image(60, 60, seed=i)]) for i in range(3)]


@pytest.fixture(scope="module")
def drafter(llava: LoadedTarget) -> FlashDrafter:
    target = llava.target
    mx.random.seed(0)
    config = FlashConfig(target.hidden_size, target.vocab_size, 3, 4, num_heads=2, head_dim=16)
    return FlashDrafter(FlashModel(config), target.embed, target.lm_head)


def test_greedy_texts_are_recorded_for_pacing(
    llava: LoadedTarget, prompts: list[Prompt], drafter: FlashDrafter
) -> None:
    for temperature in (0.0, 1.0):
        settings = bench.Settings(temperature, max_tokens=6, record=True)
        plain, ours, *_ = bench.run(llava, {"ours": drafter}, prompts[:2], settings)
        assert "recorded" not in plain
        if temperature:
            assert "recorded" not in ours
        else:
            assert sum(1 + len(text) for text in ours["recorded"]) == plain["tokens"]
            assert ours["belief"] == drafter.model.config.expected_acceptance
            assert ours["block_size"] == drafter.block_size
            assert "projected_paced" in projections(ours, 0.1)[0]


def test_rows_say_what_was_said(
    llava: LoadedTarget, prompts: list[Prompt], drafter: FlashDrafter
) -> None:
    rows = bench.run(llava, {"ours": drafter}, prompts, bench.Settings(max_tokens=12))
    assert [row["drafter"] for row in rows] == ["none", "ours", "mlx-vlm"]
    plain, ours, theirs = rows
    for row in rows:
        assert row.keys() >= KEYS
        assert row["peak_memory_gb"] > 0
    assert theirs["verify_seconds"] is None
    assert ours["verify_seconds"] > 0
    assert plain["speedup"] == plain["speedup_low"] == plain["speedup_high"] == 1.0
    assert plain["samples"] == 3
    assert plain["tokens"] == ours["tokens"] == theirs["tokens"] <= 36
    assert plain["identical"] == ours["identical"] == theirs["identical"] == 1.0
    assert ours["first_divergence"] is None
    assert plain["mean_acceptance_length"] == 1.0
    assert math.isclose(
        ours["mean_acceptance_length"], 1 + ours["accepted_per_round"], rel_tol=0.2
    )  # a budget may cut the last round
    assert len(ours["acceptance_by_position"]) == 3
    assert 0 < plain["target_entropy"] <= math.log2(llava.target.vocab_size)  # of a token


def test_mlx_vlm_is_timed_as_we_are(
    llava: LoadedTarget, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [
        SimpleNamespace(token=t, generation_tokens=n) for t, n in ((5, 1), (6, 2), (7, 3), (7, 3))
    ]
    clock = iter([0.0, 5.0, 6.0, 7.5, 90.0])  # its start, and when each response came
    monkeypatch.setattr(mlx_vlm, "stream_generate", lambda *_, **__: iter(said))
    monkeypatch.setattr(answers, "time", SimpleNamespace(perf_counter=clock.__next__))
    found = answer(llava, None, prompts[0], bench.Settings(max_tokens=3), 0)
    assert found.tokens == (5, 6, 7)
    assert (found.prefill_seconds, found.decode_seconds) == (5.0, 2.5)
    assert found.seconds_per_token == 1.25


def test_a_drafter_that_fails_leaves_the_others_standing(
    llava: LoadedTarget, prompts: list[Prompt], drafter: FlashDrafter
) -> None:
    contenders = {"broken": Broken(), "ours": drafter}
    rows = bench.run(llava, contenders, prompts[:2], bench.Settings(max_tokens=6))
    by_name = {row["drafter"]: row for row in rows}
    assert by_name["broken"]["error"] == "LookupError: no idea"
    assert "speedup" not in by_name["broken"]
    assert by_name["ours"]["error"] is None
    assert by_name["ours"]["identical"] == 1.0


def test_without_plain_decoding_nothing_is_compared(
    llava: LoadedTarget, prompts: list[Prompt], drafter: FlashDrafter
) -> None:
    rows = bench.run(llava, {bench.PLAIN: Broken(), "ours": drafter}, prompts[:1], bench.Settings())
    assert {row["error"] for row in rows} == {"LookupError: no idea"}
    assert not any("speedup" in row for row in rows)


def test_answers_of_one_token_cannot_be_timed(llava: LoadedTarget, prompts: list[Prompt]) -> None:
    with pytest.raises(ValueError, match="two tokens or more"):
        bench.run(llava, {}, prompts[:2], bench.Settings(max_tokens=1))


def test_the_peak_of_memory_is_that_of_the_answer(
    llava: LoadedTarget, prompts: list[Prompt]
) -> None:
    large = mx.zeros((4096, 4096))
    mx.eval(large)
    del large
    found = answer(llava, NoDrafter(), prompts[0], bench.Settings(max_tokens=3), 0)
    assert found.peak_memory_gb < 4096 * 4096 * 4 / 1e9


def test_sampling_has_no_mlx_vlm_row(llava: LoadedTarget, prompts: list[Prompt]) -> None:
    rows = bench.run(llava, {}, prompts[:1], bench.Settings(temperature=1.0, max_tokens=4))
    assert [row["drafter"] for row in rows] == ["none"]


def test_a_divergence_is_reported_with_its_gap(llava: LoadedTarget, prompts: list[Prompt]) -> None:
    settings = bench.Settings(max_tokens=8)
    contest = compare._Contest(llava, {}, settings)
    contest.asked.append(Asked("a", "", 1, len(prompts[0]), 1))
    plain = answer(llava, NoDrafter(), prompts[0], settings, 0)

    def found(*ours: int) -> dict[str, Any]:
        contest.divergences.clear()
        sample = Sample(contest.asked[0], (plain, replace(plain, tokens=ours)), (plain, plain))
        contest._note_divergence("ours", prompts[0], sample)
        return contest.divergences["ours"]

    wrong = (plain.tokens[3] + 1) % llava.target.vocab_size
    other = found(*plain.tokens[:3], wrong, *plain.tokens[4:])
    logits = measure.read_answer(llava.target, prompts[0], plain.tokens).logits
    assert (other["prompt"], other["position"]) == (0, 3)
    assert other["tokens"] == [wrong, plain.tokens[3]]
    gap = (logits[3, plain.tokens[3]] - logits[3, wrong]).item()
    assert other["logit_gap"] == pytest.approx(gap)
    assert found(*plain.tokens[:5]) == {
        "prompt": 0,
        "position": 5,
        "tokens": [],
        "logit_gap": None,
    }


def test_contenders_answer_in_an_order_drawn_anew_and_the_warm_up_does_not_count(
    llava: LoadedTarget, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    seeds: list[int] = []

    def noted(loaded: LoadedTarget, drafter: Any, *rest: Any) -> bench.Answer:
        seeds.append(rest[-1])
        seen.append("mlx-vlm" if drafter is None else getattr(drafter, "name", "none"))
        return answer(loaded, drafter or NoDrafter(), *rest)

    class Named(NoDrafter):
        def __init__(self, name: str) -> None:
            object.__setattr__(self, "name", name)

    monkeypatch.setattr(compare, "answer", noted)
    others = {name: Named(name) for name in "ab"}
    settings = bench.Settings(max_tokens=2, repeats=8)
    rows = bench.run(llava, others, prompts[:2], settings)
    turns = [seen[i : i + 4] for i in range(0, len(seen), 4)]
    assert len(turns) == 1 + 2 * 8  # the warm-up, and each prompt eight times
    assert all(set(turn) == {"none", "a", "b", "mlx-vlm"} for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 6
    drawn = [set(seeds[i : i + 4]) for i in range(4, len(seeds), 4)]
    assert {len(each) for each in drawn} == {1}  # all draw alike, and otherwise each time
    assert len(set.union(*drawn)) == 2 * 8
    assert {turn[0] for turn in turns} == {"none", "a", "b", "mlx-vlm"}
    assert [row["samples"] for row in rows] == [2] * 4
    assert [row["tokens"] for row in rows] == [rows[0]["tokens"]] * 4
    assert rows[0]["repeats"] == 8
    again = list(seen)
    seen.clear()
    bench.run(llava, others, prompts[:2], settings)
    assert seen == again


def test_an_answer_is_read_with_the_logits_it_was_made_from(
    llava: LoadedTarget, prompts: list[Prompt]
) -> None:
    found = answer(llava, NoDrafter(), prompts[0], bench.Settings(max_tokens=9), 0)
    logits = measure.read_answer(llava.target, prompts[0], found.tokens).logits
    assert mx.argmax(logits, axis=-1).tolist() == list(found.tokens)
    one = measure.read_answer(llava.target, prompts[0], found.tokens[:1]).logits
    assert one.shape == (1, llava.target.vocab_size)


def test_entropy_is_that_of_the_laws(llava: LoadedTarget, prompts: list[Prompt]) -> None:
    tokens = (5, 6, 7)
    logits = np.array(
        measure.read_answer(llava.target, prompts[0], tokens).logits, dtype=np.float64
    )
    law = np.exp(logits - logits.max(-1, keepdims=True))
    law /= law.sum(-1, keepdims=True)
    expected = -(law * np.log2(law)).sum()
    found = measure.total_entropy(llava.target, prompts[0], tokens)
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_interval_holds_the_median_and_narrows_with_data() -> None:
    few = [1.0, 2.0, 3.0, 4.0, 5.0]
    low, high = measure.bootstrap_interval(few)
    assert low <= 3.0 <= high
    assert low < high
    narrow = measure.bootstrap_interval(few * 40)
    assert narrow[1] - narrow[0] < high - low
    assert measure.bootstrap_interval([2.0]) == (2.0, 2.0)


def test_passes_are_timed_for_each_number_of_rows(
    llava: LoadedTarget, prompts: list[Prompt]
) -> None:
    seconds = measure.verify_cost(llava, prompts[0], (1, 3), repeats=2)
    assert list(seconds) == [1, 3]
    assert all(value > 0 for value in seconds.values())


@pytest.mark.parametrize("drafts", [["ngram"], ["none", "ngram"]], ids=["first", "later"])
def test_the_command_writes_the_report(
    drafts: list[str], tiny_llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "pictures"
    data.mkdir()
    for i in range(2):
        random_image(40, 50, seed=i).save(data / f"{i}.png")
    report = tmp_path / "report.json"
    common = ["bench", "--model", str(tiny_llava), "--max-tokens", "4", "--draft-model", *drafts]
    assert cli.run([*common, "--data", str(data), "--json", str(report)]) == 0
    assert "tokens/pass" in capsys.readouterr().out
    written = json.loads(report.read_text())
    assert {"machine", "settings", "verify_cost", "target_entropy", "rows"} <= written.keys()
    assert written["verify_cost"]["1"] == 1.0
    rows = {row["drafter"]: row for row in written["rows"]}
    assert rows.keys() == {"none", "ngram", "mlx-vlm"}
    assert (rows["ngram"]["identical"], rows["ngram"]["error"]) == (1.0, None)
    assert written["rows"][0]["threads"] == written["machine"]["blas"]["threads"]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert cli.run([*common, "--data", str(empty)]) == 1
    assert cli.run([*common, "--data", str(data), "--temperature", "-1"]) == 2


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        ("--temperature 0.5 nan", 2, "--temperature must be 0 or more; got nan"),
        ("--temperature inf", 2, "got inf"),
        ("--seed -1", 2, "--seed"),
        ("--json {data}/missing/report.json", 1, "--json must name a file in a folder"),
        ("--plot {data}/missing/a.png", 1, "--plot must name a file in a folder"),
        ("--data {data}/none.jsonl", 1, "none.jsonl does not exist"),
        ("--model /no/such/model --json {data}/report.json", 1, "/no/such/model"),
    ],
)
def test_a_command_that_fails_says_why_and_writes_no_report(
    words: str, code: int, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random_image(40, 50).save(tmp_path / "0.png")
    arguments = ["bench", "--data", str(tmp_path), *words.format(data=tmp_path).split()]
    assert cli.run(arguments) == code
    assert part in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["0.png"]


def test_later_drafters_are_named_as_the_first_one_is(tiny_llava: Path) -> None:
    model = load(tiny_llava, "none")
    found = cli.bench._drafters(model, ["none", "auto"], [2])
    assert list(found) == ["ngram"]
    assert found["ngram"].num_drafts == 2
