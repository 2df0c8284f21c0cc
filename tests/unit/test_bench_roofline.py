"""Projections are the arithmetic that they print, from bytes that configurations give."""

import json
from pathlib import Path
from typing import Any

import pytest

from commands import command
from flash_mlx import cli
from flash_mlx.bench.macs import BANDWIDTH, CURVES, curve_of, projections, replayed
from flash_mlx.bench.roofline import MODELS, Machine, Shape, arithmetic, best, bytes_of, project
from flash_mlx.cost import Costs

CONFIGS = Path(__file__).resolve().parents[3] / "shared" / "data" / "configs"
SMALL = Shape("small", 64, 128, 2, 4, 2, 16, 100)
LINEAR = Machine("m", 10.0, Costs(1.0, ((1, 1.0), (3, 2.0))), "by hand")


def test_weights_are_those_of_the_layers_and_the_head() -> None:
    # q 64 x 64, k and v 64 x 32, o 64 x 64; three of 64 x 128; the head 100 x 64.
    assert SMALL.layer_weights == 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
    assert SMALL.weights == 2 * SMALL.layer_weights + 6400
    assert SMALL.context_bytes(10) == 2 * 2 * 2 * 16 * 2 * 10  # keys and values, 16 bits
    assert bytes_of(64, 4) == 64 / 2 + 4  # a scale and a bias of two bytes each
    assert bytes_of(64, 8) == 64 + 4
    assert bytes_of(64, 16) == 128


def test_the_bytes_of_a_pass_are_those_of_a_known_model() -> None:
    # Counted by others: 3.98 GB and 57 kB a token for Qwen2.5-VL-7B, 3.72 GB and 524 kB for LLaVA.
    by_name = {shape.name.split("/")[1]: shape for shape in MODELS}
    seven, llava = by_name["Qwen2.5-VL-7B-Instruct"], by_name["llava-1.5-7b-hf"]
    assert bytes_of(seven.weights, 4) / 1e9 == pytest.approx(3.98, abs=0.005)
    assert seven.context_bytes(1) == 57344
    assert bytes_of(llava.weights, 4) / 1e9 == pytest.approx(3.72, abs=0.005)
    assert llava.context_bytes(1) == 524288


@pytest.mark.skipif(not CONFIGS.is_dir(), reason="needs the real configurations")
@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf"),
        ("qwen2.5-vl-3b", "Qwen/Qwen2.5-VL-3B-Instruct"),
        ("qwen2.5-vl-7b", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("qwen3-vl-embedding", "Qwen/Qwen3-VL-8B-Instruct"),
    ],
)
def test_the_known_models_are_those_of_real_configurations(folder: str, name: str) -> None:
    config = json.loads((CONFIGS / folder / "config.json").read_text())
    assert Shape.from_config(name, config) in MODELS


def test_a_projection_is_its_arithmetic() -> None:
    row = project(SMALL, LINEAR, bits=16, context=1000, acceptance=0.5, drafts=2)
    weights, memory = 2 * SMALL.weights, SMALL.context_bytes(1000)
    draft = 2 * (SMALL.drafter_weights(2) + 6400)
    plain, three = weights + memory, 2 * weights + 3 * memory + draft
    assert row["tokens_per_pass"] == 1.75
    assert row["pass_cost"] == 2.0
    assert row["projected_speedup"] == pytest.approx(1.75 * plain / three)
    assert row["projected_plain_tps"] == pytest.approx(10e9 / plain)
    assert row["projected_tps"] == pytest.approx(1.75 * 10e9 / three)
    assert "projected: 1.75 tokens x" in arithmetic(row)


def test_a_drafter_of_some_tokens_reads_their_rows_alone(tmp_path: Path) -> None:
    how: dict[str, Any] = {"bits": 16, "context": 0, "acceptance": 0.5, "drafts": 2}
    whole = project(SMALL, LINEAR, **how)
    some, most = (project(SMALL, LINEAR, **how, draft_vocab=n) for n in (25, 1000))
    assert (whole["draft_vocab"], some["draft_vocab"]) == (100, 25)
    assert whole["draft_gb"] - some["draft_gb"] == pytest.approx(2 * 75 * 64 / 1e9)
    assert some["projected_speedup"] > whole["projected_speedup"]
    assert most == whole
    file = tmp_path / "rows.json"
    words = ["bench", "--roofline", "--chip", "M3 Max", "--model", MODELS[0].name]
    assert cli.run([*words, "--draft-vocab", "8192", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["rows"][0]["draft_vocab"] == 8192
    assert cli.run(["bench", "--draft-vocab", "8192"]) == 2


def test_a_cost_that_was_not_measured_says_so(tmp_path: Path) -> None:
    for drafts, says in ((2, False), (3, True)):  # LINEAR was measured for 3 rows
        row = project(SMALL, LINEAR, bits=4, context=0, acceptance=0.5, drafts=drafts)
        assert row["measured_rows"] == 3
        assert ("C(4) was not measured: beyond 3 rows" in arithmetic(row)) == says
    words = ["bench", "--roofline", "--chip", "M3 Max", "M5", "--draft-block-size", 16]
    code, out, _ = command(*words, "--model", MODELS[0].name, "--markdown")
    rows = [line for line in out.decode().splitlines() if line.startswith("| llava")]
    assert code == 0
    assert ["*" in row for row in rows] == [False, True]  # measured for 32 rows and for 16
    assert "- * beyond the rows that were measured." in out.decode()


def test_certain_drafts_for_nothing_bring_all_of_them() -> None:
    free = Machine("m", 1.0, Costs(1.0, ((1, 1.0), (16, 1.0))), "")
    large = Shape("large", 64, 128, 10_000, 4, 2, 16, 100)
    row = project(large, free, bits=4, context=0, acceptance=1.0, drafts=4)
    assert row["projected_speedup"] == pytest.approx(5, rel=0.01)


def test_the_best_number_of_drafts_is_found() -> None:
    def at(drafts: int) -> float:
        row = project(SMALL, LINEAR, bits=4, context=0, acceptance=0.9, drafts=drafts)
        return float(row["projected_speedup"])

    found = best(SMALL, LINEAR, bits=4, context=0, acceptance=0.9)
    assert found["projected_speedup"] == max(map(at, range(1, 9)))
    assert best(SMALL, LINEAR, bits=4, context=0, acceptance=0.9, drafts=3)["drafts"] == 3


def test_recorded_texts_are_paced_at_each_curve() -> None:
    row: dict[str, Any] = {"outcomes": [[4, 4, 9]], "belief": 0.9, "block_size": None}
    row["recorded"] = [[4] * 200, [0] * 100, []]
    for found, curve in zip(projections(row, 0.1), CURVES, strict=True):
        # The second text may lose what the first one gained, up to six of its hundred tokens.
        assert 0.93 <= found["projected_worst"] <= 1
        if curve.name == "M3 Max":  # three drafts cost 1.38 tokens
            whole = 200 * 1.38 / 4 + 100
            assert 300 / (whole + 20) < found["projected_paced"] < 300 / whole
    assert "projected_paced" not in projections({"outcomes": [[4, 4, 9]]}, 0.1)[0]


def test_a_block_that_is_never_right_to_its_end_is_paced_as_one() -> None:
    row: dict[str, Any] = {"outcomes": [[4, 4, 9]], "belief": 0.9, "recorded": [[2, 1] * 30]}
    short, whole = (projections(row | {"block_size": size}, 0.15)[-1] for size in (2, 10))
    assert whole["projected_paced"] < 0.9 * short["projected_paced"]


def test_recorded_rounds_are_replayed_at_given_costs() -> None:
    costs = Costs(1.0, ((1, 1.0), (3, 1.5), (5, 3.0)))
    outcomes = [[0, 0, 2], [4, 4, 1], [4, 1, 1]]  # 2 + 5 + 2 tokens
    assert replayed(outcomes, costs, 0.25) == pytest.approx(9 / (2 + 2 * 3.25))
    assert replayed(outcomes, costs, 0.25, width=2) == pytest.approx(7 / (2 + 2 * 1.75))
    assert replayed(outcomes, costs, 0.25, width=0) == 1.0
    assert replayed([], costs, 0.25) == 1.0


def test_the_best_width_is_projected_for_each_curve() -> None:
    row = {"outcomes": [[4, 4, 9], [4, 0, 1]]}
    for found, curve in zip(projections(row, 0.1), CURVES, strict=True):
        widths = [replayed(row["outcomes"], curve.costs, 0.1, k) for k in range(5)]
        assert found["projected_speedup"] == max(widths)
        assert widths[found["drafts"]] == max(widths)
        assert found["projected_as_recorded"] == pytest.approx(widths[4])
        assert found["source"] == curve.source
        assert (found["rows"], found["measured_rows"]) == (5, curve.times[-1][0])


def test_each_chip_has_a_bandwidth_and_a_curve() -> None:
    assert {chip.split()[0] for chip in BANDWIDTH} == {"M1", "M2", "M3", "M4", "M5"}
    assert [curve_of(chip).name for chip in ("M1 Pro", "M3 Ultra", "M4", "M5 Max")] == [
        "row by row (M1, M2)",
        "M3 Max",
        "M4 Pro",
        "M5 Max",
    ]
    assert [curve.costs.round(1) for curve in CURVES] == pytest.approx([1.0] * 4, abs=0.011)
    with pytest.raises(ValueError, match="must be one of M1, "):
        curve_of("M3 Mega")


def test_the_command_projects_from_a_configuration_alone(tmp_path: Path) -> None:
    text = {"model_type": "x", "hidden_size": 64, "intermediate_size": 128, "vocab_size": 100}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text}))
    words = ["bench", "--roofline", "--model", tmp_path, "--chip", "M3 Max", "M4", "--bits", "8"]
    code, out, _ = command(*words, "--context", 0, 512, "--json", tmp_path / "out.json")
    assert code == 0
    assert b"projected speed-up" in out
    assert b"Nothing here was measured" in out
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["projected"] is True
    assert [(row["machine"], row["context"]) for row in report["rows"]] == [
        ("M3 Max", 0),
        ("M3 Max", 512),
        ("M4", 0),
        ("M4", 512),
    ]
    assert "4-bit" in report["rows"][0]["cost_source"]


@pytest.mark.parametrize(
    "words", ["--bits 4", "--chip M4", "--bandwidth 9", "--context 0", "--acceptance 0.8"]
)
def test_options_of_the_projection_do_not_stand_alone(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["bench", *words.split()]) == 2
    assert f"{words.split()[0]} must stand with --roofline" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        ("--chip M9", 2, "A chip must be one of"),
        ("--model /no/such", 2, "--model must be a folder with a config.json"),
        ("--acceptance 1.5", 2, "--acceptance must be between 0 and 1"),
        ("--plot {bad}/a.png", 2, "--plot must stand without --roofline"),
        ("--bandwidth 0", 2, "--bandwidth must be above 0"),
        ("--json /no/such/out.json", 1, "--json must name a file in a folder"),
        ("--model {bad}", 1, "must give the sizes"),
    ],
)
def test_what_cannot_be_projected_says_why(
    words: str, code: int, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 4}')
    assert cli.run(["bench", "--roofline", *words.format(bad=tmp_path).split()]) == code
    assert part in capsys.readouterr().err
