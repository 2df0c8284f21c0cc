"""The figures of a benchmark, against values computed by hand."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from flash_mlx.bench.answers import Answer
from flash_mlx.bench.figures import Asked, Sample, counts, describe, figures
from flash_mlx.bench.plot import plot
from flash_mlx.bench.report import bound, build, revision
from flash_mlx.bench.table import render
from flash_mlx.blas import BlasInfo
from flash_mlx.doctor import Report
from flash_mlx.measure import bootstrap_interval
from flash_mlx.stats import GenerationStats


def made(
    tokens: int,
    prefill: float,
    decode: float,
    outcomes: dict[tuple[int, int], int] | None = None,
    memory: float = 1.0,
) -> Answer:
    """An answer of ids 0, 1, ...; a round brings what it accepted and one token."""
    stats = GenerationStats(generation_tokens=tokens, outcomes=Counter(outcomes or {}))
    for (_, accepted), number in stats.outcomes.items():
        stats.accept_lengths[accepted + 1] += number
    return Answer(tuple(range(tokens)), prefill, decode, stats, memory)


def asked(name: str = "a", topic: str = "") -> Asked:
    return Asked(name, topic, 1, 20, 16)


def sample(ours: Answer, plain: Answer, topic: str = "") -> Sample:
    return Sample(asked(topic=topic), (ours,), (plain,))


PLAIN = made(11, 1.0, 10.0)  # a second a token, 11 s in all


def test_a_drafter_in_half_the_time_is_twice_as_fast() -> None:
    row = figures([sample(made(11, 1.0, 5.0), PLAIN)])
    assert row["speedup"] == row["speedup_low"] == row["speedup_high"] == 2.0
    assert row["generation_tps"] == 2.0
    assert row["end_to_end_speedup"] == pytest.approx(11 / 6)
    assert row["ttft_ratio"] == 1.0
    assert row["latency_p50"] == row["latency_p95"] == 6.0


def test_ratios_are_taken_prompt_by_prompt() -> None:
    # Each prompt is twice as fast, but the medians of all times would say 1.25.
    pairs = [(made(11, 1, 5.0), PLAIN), (made(11, 1, 40.0), made(11, 1, 80.0))]
    pairs += [(made(11, 1, 8.0), made(11, 1, 16.0))]
    assert figures([sample(*pair) for pair in pairs])["speedup"] == 2.0


def test_times_are_a_token_so_texts_of_other_lengths_compare() -> None:
    row = figures([sample(made(21, 1.0, 10.0), PLAIN)])  # twice as many tokens in the same time
    assert row["speedup"] == 2.0
    assert row["end_to_end_speedup"] == pytest.approx((11 / 11) / (11 / 21))


def test_repeats_of_a_prompt_count_once() -> None:
    once = Sample(asked(), (made(11, 1, 5.0),) * 3, (PLAIN,) * 3)
    noisy = Sample(
        asked(),
        (made(11, 1, 5.0), made(11, 1, 2.5), made(11, 1, 1.25)),
        (PLAIN, PLAIN, PLAIN),
    )
    row = figures([once, noisy])
    assert (once.speedup, noisy.speedup) == (2.0, 4.0)
    assert (row["samples"], row["repeats"], row["speedup"]) == (2, 3, 3.0)
    assert row["speedups"] == [2.0, 4.0]
    assert row["tokens"] == 66


def test_percentiles_and_time_to_the_first_token() -> None:
    ours = [made(2, float(i), 0.5) for i in range(1, 22)]
    row = figures([sample(each, made(2, 2.0, 1.0)) for each in ours])
    assert row["latency_p50"] == 11.5
    assert row["latency_p95"] == 20.5
    assert row["ttft_seconds"] == 11.0
    assert row["ttft_ratio"] == 5.5
    assert row["peak_memory_gb"] == 1.0


def test_both_conventions_of_acceptance() -> None:
    # 1 token of the prefill; rounds bring 4, 1, 3 and 1 tokens with 3, 0, 2 and 0 drafts accepted.
    answer = made(10, 1, 1, {(3, 3): 1, (3, 0): 1, (4, 2): 1, (0, 0): 1})
    got = counts([answer])
    assert (got["tokens"], got["rounds"], got["drafted"], got["accepted"]) == (10, 4, 10, 5)
    assert got["mean_acceptance_length"] == 9 / 4
    assert got["accepted_per_round"] == 5 / 4
    assert got["acceptance_rate"] == 0.5
    # Slot 0 and 1: three rounds offered one, two took it; slot 2: one of three; slot 3: 0 of 1.
    assert got["acceptance_by_position"] == [2 / 3, 2 / 3, 1 / 3, 0]
    assert got["outcomes"] == [[0, 0, 1], [3, 0, 1], [3, 3, 1], [4, 2, 1]]
    two = counts([answer, answer])
    assert two["mean_acceptance_length"] == 9 / 4
    assert two["rounds"] == 8


def test_identical_is_the_share_of_answers_with_equal_ids() -> None:
    other = made(11, 1, 5)
    other = Answer((*other.tokens[:-1], 99), 1, 5, other.stats, 1)
    assert figures([sample(other, PLAIN), sample(made(11, 1, 5), PLAIN)])["identical"] == 0.5


def test_a_prompt_with_one_token_has_no_decoding_to_compare() -> None:
    row = figures([sample(made(1, 1, 0), made(1, 1, 0)), sample(made(11, 1, 5), PLAIN)])
    assert (row["speedups"], row["speedup"]) == ([None, 2.0], 2.0)
    assert row["generation_tps"] == 2.0
    with pytest.raises(ValueError, match="two tokens or more"):
        figures([sample(made(1, 1, 0), made(1, 1, 0))])


def test_figures_by_topic() -> None:
    some = [
        sample(made(11, 1, 5, {(2, 1): 5}), PLAIN, "chart"),
        sample(made(11, 1, 2.5, {(2, 0): 10}), PLAIN, "chart"),
        sample(made(11, 1, 10, {(0, 0): 10}), PLAIN, "chat"),
    ]
    found = figures(some)["by_topic"]
    assert found["chart"] == {
        "samples": 2, "speedup": 3.0, "tokens": 22, "rounds": 15, "accepted": 5,
        "mean_acceptance_length": 20 / 15, "accepted_per_round": 5 / 15,
    }  # fmt: skip
    assert found["chat"]["speedup"] == 1.0
    assert figures(some[:2])["by_topic"] == {}


def test_what_was_asked_is_described() -> None:
    text = Asked("b", "", 0, 8, 0)
    found = describe([asked(topic="x"), text, asked("c", "x")])
    assert (found["pictures"], found["text_only"]) == (2, 1)
    assert (found["prompt_tokens"], found["visual_tokens"]) == (20, 16)
    assert found["topics"] == {"x": 2}
    assert found["prompts"][1]["name"] == "b"


def test_the_bound_is_what_costs_allow() -> None:
    # Two rounds of 3 drafts (a pass of 1.4 plain tokens), 1 of none; 8 tokens in 3 rounds; a draft
    # of 0.2 plain tokens.
    row: dict[str, Any] = {"outcomes": [[0, 0, 1], [3, 3, 2]], "rounds": 3, "drafted": 6}
    row |= {"mean_acceptance_length": 8 / 3, "draft_seconds": 0.02, "speedup": 1.5}
    found = bound(row, {1: 0.1, 2: 0.12, 4: 0.14}, 0.1)
    most = (8 / 3) / ((1.4 + 1.4 + 1) / 3 + 0.2)
    assert found["bound"] == pytest.approx(most)
    assert found["of_bound"] == pytest.approx(1.5 / most)
    assert found["unmeasured_rounds"] == 0
    assert bound(row, {1: 0.1, 3: 0.12}, 0.1)["unmeasured_rounds"] == 2
    # Plain decoding queues its passes ahead: one that is waited for is no measure of it.
    faster = bound(row, {1: 0.1, 2: 0.12, 4: 0.14}, 0.08)["bound"]
    assert faster == pytest.approx((8 / 3) / ((1.75 + 1.75 + 1) / 3 + 0.25))


def machine(folder: Path) -> Report:
    blas = BlasInfo(True, "OpenBLAS", folder / "libblas.so", 2, "found")
    versions = {"flash-mlx": "0", "mlx": "1", "mlx-vlm": "2"}
    return Report("Linux", "CPU", 2, 8.0, "3", versions, "cpu", "CPU", blas, {1: 1.0}, 1e-3, {})


def report(folder: Path, drafting: float | None = 0.25, **more: Any) -> dict[str, Any]:
    said = {"drafter": "none", "temperature": 0.0, "error": None, "target_entropy": 0.5}
    said |= {"asked": describe([asked()]), "first_divergence": None, "latents": 0.0}
    said |= figures([sample(PLAIN, PLAIN)])
    clocked = {"draft_seconds": drafting, "verify_seconds": 1.0, "host_seconds": 0.05}
    ours = {"drafter": "ours|a", "temperature": 0.0, "error": None, **clocked, "latents": 4.0}
    ours["first_divergence"] = {"prompt": 0, "position": 7, "tokens": [1, 2], "logit_gap": 1e-6}
    ours |= figures([sample(made(11, 1, 5, {(2, 1): 5}), PLAIN)])
    failed = {"drafter": "bad", "temperature": 0.0, "error": "ValueError: no luck"}
    costs, skipped = {1: 1.0, 4: 1.4}, {"b": "it is gone"}
    return build([said, ours, failed], {"model": "m"}, machine(folder), costs, skipped, **more)


def test_the_report_holds_no_path_of_the_machine(tmp_path: Path) -> None:
    made = report(tmp_path)
    text = json.dumps(made)
    assert str(tmp_path) not in text
    assert made["machine"]["blas"]["path"] == "libblas.so"
    assert made["rows"][1]["threads"] == 2
    assert made["verify_cost"] == {"1": 1.0, "4": 1.4}
    assert made["skipped"] == {"b": "it is gone"}
    assert "asked" not in made["rows"][0]


def test_the_table_says_all_that_was_measured(tmp_path: Path) -> None:
    text = render(report(tmp_path))
    head, _plain, ours, failed, *lines = text.splitlines()
    assert head.split()[:4] == ["drafter", "T", "threads", "tok/s"]
    # bound: 2 tokens a pass / (1.267 + 0.25)
    cells = ["ours|a", "0", "2", "2.0", "2.00", "2.00", "-", "2.00", "152%", "1.83", "6.000"]
    assert ours.split() == [*cells, "6.000", "2.00", "1.00", "1.00", "0.500"]
    assert failed.split() == ["bad", "0", "2", "failed"]
    below = "\n".join(lines)
    assert "bad at temperature 0 failed: ValueError: no luck" in below
    assert "round of 1300.00 ms: drafter 250.00, target 1000.00, neither 50.00 (3.8%)" in below
    assert "first other token in a, place 7: logits 1e-06 apart" in below
    assert "by slot: 100% 0%" in below
    assert "1: 1.00  4: 1.40" in below
    assert "wider than were timed" not in below
    made = report(tmp_path)
    projected = {"curve": "M", "projected_speedup": 2.0, "drafts": 2, "projected_as_recorded": 1.5}
    projected |= {"draft_cost": 0.1, "source": "a table", "rows": 3, "measured_rows": 3}
    made["rows"][1] |= {"unmeasured_rounds": 2, "projected": [projected]}
    text = render(made)
    assert f"2 of {made['rows'][1]['rounds']} passes wider than were timed" in text
    assert "a table\n" in text
    projected["measured_rows"] = 2
    assert "a table; up to 3 rows a pass, but measured for 2" in render(made)
    assert "16 of them visual; on average 4 latents for ours|a" in below
    assert "Skipped b: it is gone" in below


@pytest.mark.parametrize(("drafting", "projects"), [(0.25, True), (None, False)])
def test_where_no_draft_was_clocked_nothing_is_projected(
    tmp_path: Path, drafting: float | None, projects: bool
) -> None:
    made = report(tmp_path, drafting, replay_costs=True)
    assert [("projected" in row) for row in made["rows"]] == [False, projects, False]
    assert ("projected at the 4-bit costs of" in render(made)) == projects


def test_the_entropy_is_that_of_the_temperature(tmp_path: Path) -> None:
    made = report(tmp_path)
    plain, ours, _ = made["rows"]
    made["rows"] = [plain, ours, plain | {"temperature": 1.0, "target_entropy": 0.75}]
    made["rows"].append(ours | {"temperature": 1.0})
    bits = [line.split()[-1] for line in render(made).splitlines()[1:5]]
    assert bits == ["0.500", "0.500", "0.750", "0.750"]


def test_markdown_has_a_cell_for_each_column(tmp_path: Path) -> None:
    lines = render(report(tmp_path), markdown=True).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 5
    assert {line.replace("\\|", "").count("|") for line in table} == {15}
    assert "| ours\\|a | 0 | 2 | 2.0 | 2.00 |" in table[3]
    assert "- Skipped b: it is gone" in lines


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    plot(report(tmp_path), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_interval_is_that_of_the_median() -> None:
    low, high = bootstrap_interval([1.0, 1.0, 1.0, 9.0, 9.0, 9.0, 9.0])
    assert (low, high) == (1.0, 9.0)
    assert bootstrap_interval([3.0] * 5) == (3.0, 3.0)


def test_the_revision_is_a_commit_or_unknown() -> None:
    found = revision()
    assert found is None or len(found.rstrip("+")) == 40
