"""The loop says recorded texts, and its books are those kept by hand."""

from pathlib import Path

import mlx.core as mx
import pytest

from flash_mlx.bench.replay import ALL, ReplayTarget, Turn, by_topic, read_turns, replay
from flash_mlx.decode import NoDrafter
from flash_mlx.draft.ngram import NgramDrafter, NgramRule
from flash_mlx.prompt import Prompt
from flash_mlx.tree import DraftTree, Topology

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
# "1 2 3 4 1 2", answered with "3 4 9 3 4 9" and a stop.
TURN = Turn("t", Prompt((1, 2, 3, 4, 1, 2)), (3, 4, 9, 3, 4, 9, 0), 10)
PAIRS = NgramRule(2, 2, "latest", drafts_per_match=None)


def test_every_statistic_is_that_of_the_count_by_hand() -> None:
    # root 3: "2 3" was followed by 4 1 2; 4 is right, then 9.       3 drafted, 1 accepted
    # "4 9" and "9 3" are new.                                       two rounds of none
    # "3 4" was last followed by 9 3; of two tokens left 9 is one.   1 drafted, 1 accepted
    stats = replay(TURN, NgramDrafter(3, PAIRS)).stats
    assert stats.outcomes == {(3, 1): 1, (0, 0): 2, (1, 1): 1}
    assert stats.accept_lengths == {2: 2, 1: 2}
    assert (stats.generation_tokens, stats.rounds) == (7, 4)
    assert (stats.drafted, stats.accepted, stats.acceptance_rate) == (4, 2, 0.5)
    assert stats.mean_acceptance_length == 6 / 4
    assert stats.acceptance_by_position == (1.0, 0.0, 0.0)
    found = by_topic([TURN, TURN], lambda: NgramDrafter(3, PAIRS))
    assert found["t"] == found[ALL]
    assert found[ALL]["outcomes"] == [[0, 0, 4], [1, 1, 2], [3, 1, 2]]
    assert found[ALL]["mean_acceptance_length"] == 1.5
    assert found[ALL]["accepted_per_round"] == 0.5


def test_the_earliest_match_is_another_one() -> None:
    # As above, but "3 4" was first followed by 1 2 3: rejected, and then the stop alone.
    rule = NgramRule(2, 2, "earliest", drafts_per_match=None)
    stats = replay(TURN, NgramDrafter(3, rule)).stats
    assert stats.outcomes == {(3, 1): 1, (0, 0): 3, (1, 0): 1}
    assert stats.acceptance_by_position == (0.5, 0.0, 0.0)


def test_plain_decoding_says_it_one_by_one() -> None:
    stats = replay(TURN, NoDrafter()).stats
    assert stats.outcomes == {(0, 0): 6}
    assert stats.mean_acceptance_length == 1.0


def test_rows_of_a_tree_are_about_the_place_after_them() -> None:
    target = ReplayTarget(TURN)
    cache = target.make_cache()
    first = target.prefill(TURN.prompt, cache)
    tree = DraftTree(Topology((-1, 0, 0, 1)), mx.array([3, 4, 5, 9]))
    logits = target.verify(tree, cache).logits
    assert mx.argmax(first.logits, axis=-1).tolist() == [3]
    assert mx.argmax(logits, axis=-1).tolist() == [4, 9, 9, 3]
    assert mx.softmax(logits, axis=-1).max(axis=-1).tolist() == [1.0] * 4
    with pytest.raises(ValueError, match="no hidden states"):
        target.lm_head(logits)


@pytest.mark.skipif(not (DATA / "mmspec").is_dir(), reason="needs the recorded texts")
@pytest.mark.parametrize(
    ("answers", "tokenizer", "rule", "accepted", "reasoning", "captions"),
    [
        ("LLaVA-1.5-7B", "llava-1.5-7b-hf", "earliest", 0.40, 1.59, 0.03),
        ("LLaVA-1.5-7B", "llava-1.5-7b-hf", "latest", 0.46, 1.70, 0.03),
        pytest.param(
            "Qwen2.5-VL-7B",
            "qwen2.5-vl-7b",
            "latest",
            0.22,
            0.46,
            0.01,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_texts_of_real_models_are_drafted_as_often_as_a_separate_count_says(
    answers: str,
    tokenizer: str,
    rule: str,
    accepted: float,
    reasoning: float,
    captions: float,
) -> None:
    folder = DATA / "mmspec"
    recorded = folder / f"baseline-{answers}.jsonl"
    found = by_topic(
        list(read_turns(folder / "mmspec.jsonl", recorded, DATA / "configs" / tokenizer)),
        lambda: NgramDrafter(10, NgramRule(2, 3, rule, None)),
    )
    rates = {topic: counts["accepted_per_round"] for topic, counts in found.items()}
    assert rates[ALL] == pytest.approx(accepted, abs=0.005)
    assert rates["complex reasoning pro"] == pytest.approx(reasoning, abs=0.01)
    assert rates["image captioning"] == pytest.approx(captions, abs=0.005)
    assert len(rates) == 7
