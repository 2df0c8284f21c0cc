"""Which tokens each row's penalties count, and what else happens to the target's logits."""

import io
import re
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flash_mlx.penalties import Penalties, make_penalties
from flash_mlx.processed import ProcessedTarget, processed
from flash_mlx.prompt import Prompt
from flash_mlx.tree import DraftTree, Topology
from toy import ToyTarget

NAN, INF = float("nan"), float("inf")
TOPOLOGY = Topology((-1, 0, 0, 1, 3))
#    5 -- 3 -- 3 -- 4
#     \- 3
TREE = DraftTree(TOPOLOGY, mx.array([5, 3, 3, 3, 4], dtype=mx.int32))
TEXT = mx.array([1, 2, 5, 2], dtype=mx.int32)
PATHS = ([5], [5, 3], [5, 3], [5, 3, 3], [5, 3, 3, 4])


def counts(context_size: int) -> np.ndarray:
    """Return [N, V] how often each row's window holds each token, [V] = 0 to 5."""
    penalty = Penalties(frequency_penalty=-1.0, frequency_context_size=context_size)
    return np.array(penalty.apply(mx.zeros((5, 6)), TEXT, TREE))


@pytest.mark.parametrize("context_size", [1, 2, 3, 4, 5, 7, 8, 100])
def test_a_window_ends_with_the_row_and_holds_its_path_only(context_size: int) -> None:
    for row, path in enumerate(PATHS):
        window = [*TEXT.tolist(), *path][-context_size:]
        assert counts(context_size)[row].tolist() == [window.count(token) for token in range(6)]


def test_a_text_may_begin_with_the_tree() -> None:
    penalty = Penalties(frequency_penalty=-1.0)
    changed = penalty.apply(mx.zeros((5, 6)), TEXT[:0], TREE)
    assert changed[3].tolist() == [0, 0, 0, 2, 0, 1]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"repetition_penalty": 2.0}, [1.0, -2.0, 3.0, 1.0]),
        ({"repetition_penalty": 0.5}, [4.0, -0.5, 3.0, 1.0]),
        ({"presence_penalty": 0.5}, [1.5, -1.5, 3.0, 1.0]),
        ({"frequency_penalty": 0.5}, [1.0, -1.5, 3.0, 1.0]),
        ({"logit_bias": {0: 1.0, 2: -2.5}}, [3.0, -1.0, 0.5, 1.0]),
        # In this order: bias, repetition, presence, frequency.
        (
            {
                "logit_bias": {0: -1.0, 3: 1.0},
                "repetition_penalty": 2.0,
                "presence_penalty": 0.25,
                "frequency_penalty": 0.5,
            },
            [-0.75, -2.75, 3.0, 2.0],
        ),
    ],
)
def test_what_each_setting_does(settings: dict[str, Any], expected: list[float]) -> None:
    text, tree = mx.array([0, 1]), DraftTree(Topology.chain(0), mx.array([0]))
    logits = mx.array([[2.0, -1.0, 3.0, 1.0]])
    changed = Penalties(**settings).apply(logits, text, tree)
    assert changed.tolist() == [expected]
    assert logits.tolist() == [[2.0, -1.0, 3.0, 1.0]]


@pytest.mark.parametrize("name", ["repetition", "presence", "frequency"])
def test_each_penalty_has_its_own_window(name: str) -> None:
    windows = dict.fromkeys(("repetition", "presence", "frequency"), 1) | {name: 3}
    sizes = {f"{each}_context_size": size for each, size in windows.items()}
    penalty = Penalties(**{f"{name}_penalty": 2.0}, **sizes)
    text, tree = mx.array([0, 1, 2]), DraftTree(Topology.chain(0), mx.array([3]))
    assert penalty.apply(mx.full((1, 5), 4.0), text, tree).tolist() == [[4, 2, 2, 2, 4]]


def test_penalties_count_the_prompts_last_token_and_what_follows() -> None:
    plain = ToyTarget(vocab_size=11)
    target = ProcessedTarget(plain, Penalties(frequency_penalty=1.0))
    cache = target.make_cache()
    lost = plain.read([4, 7, 4]) - target.prefill(Prompt((4, 7, 4)), cache).logits
    np.testing.assert_allclose(lost[-1], [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0], atol=1e-5)
    tree = DraftTree(Topology.chain(1), mx.array([4, 2], dtype=mx.int32))
    lost = plain.read([4, 7, 4, 4, 2])[-2:] - target.verify(tree, cache).logits
    np.testing.assert_allclose(lost[1], [0, 0, 1, 0, 2, 0, 0, 0, 0, 0, 0], atol=1e-5)


def test_the_type_of_the_logits_stays() -> None:
    settings = Penalties(1.5, 0.5, 0.25, {1: 1.0})
    for dtype in (mx.float16, mx.bfloat16, mx.float32):
        assert settings.apply(mx.ones((5, 6), dtype), TEXT, TREE).dtype == dtype


def test_nothing_set_is_the_target_itself() -> None:
    target = ToyTarget()
    assert processed(target, Penalties()) is target
    assert processed(target, make_penalties(presence_penalty=None, logit_bias={})) is target
    for settings in (
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"logit_bias": {3: 1.0}},
    ):
        assert isinstance(processed(target, make_penalties(**settings)), ProcessedTarget)
    assert isinstance(processed(target, Penalties(), [lambda _, x: x]), ProcessedTarget)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"repetition_penalty": 0.0}, "repetition penalty must be above 0"),
        ({"repetition_penalty": -1.0}, "got -1.0"),
        ({"repetition_penalty": INF}, "got inf"),
        ({"repetition_penalty": NAN}, "got nan"),
        ({"presence_penalty": 2.5}, "presence penalty must be between -2 and 2"),
        ({"frequency_penalty": -3.0}, "frequency penalty must be between -2 and 2"),
        ({"frequency_penalty": NAN}, "got nan"),
        ({"repetition_context_size": 0}, "context size of the repetition penalty"),
        ({"presence_context_size": -5}, "got -5"),
        ({"frequency_context_size": 1.5}, "whole number"),
        ({"logit_bias": {-1: 1.0}}, "a token id; got -1"),
        ({"logit_bias": {"3": 1.0}}, "a token id; got '3'"),
        ({"logit_bias": {3: INF}}, "token 3 must be a number"),
        ({"logit_bias": {3: NAN}}, "got nan"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        Penalties(**settings)


def test_a_bias_for_a_token_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0 to 10; got one for token 11"):
        ProcessedTarget(ToyTarget(vocab_size=11), Penalties(logit_bias={10: 1.0, 11: 1.0}))


def texts_seen(rows: Sequence[int]) -> list[list[int]]:
    """Return the texts that a processor is called with, after `rows` of a tree were committed."""
    seen: list[list[int]] = []

    def note(tokens: mx.array, logits: mx.array) -> mx.array:
        assert logits.shape == (1, 11)
        assert tokens.dtype == mx.int32
        seen.append(tokens.tolist())
        return logits

    target = ProcessedTarget(ToyTarget(vocab_size=11), Penalties(), [note])
    cache = target.make_cache()
    target.prefill(Prompt((7, 8, 9)), cache)
    assert seen == [[7, 8, 9]]
    target.verify(DraftTree(TOPOLOGY, mx.zeros(5, dtype=mx.int32)), cache)
    target.verify(TREE, cache)  # takes the place of the one before
    assert seen[6:] == [[7, 8, 9, *path] for path in PATHS]
    cache.commit(rows)
    assert cache.length == 3 + len(rows)
    target.verify(DraftTree(Topology.chain(0), mx.array([10], dtype=mx.int32)), cache)
    return seen[11:]


def test_processors_get_the_whole_text_of_each_row() -> None:
    assert texts_seen((0,)) == [[7, 8, 9, 5, 10]]
    assert texts_seen((0, 1, 3)) == [[7, 8, 9, 5, 3, 3, 10]]


def test_processors_come_in_order_after_the_penalties() -> None:
    def double(_: mx.array, logits: mx.array) -> mx.array:
        return 2 * logits

    def add(_: mx.array, logits: mx.array) -> mx.array:
        logits[:, 4] += 1  # the array that came
        return logits

    plain = ToyTarget(vocab_size=11)
    target = ProcessedTarget(plain, Penalties(logit_bias={4: 3.0}), [double, add])
    text = (7, 8, 4)
    out = target.prefill(Prompt(text), target.make_cache())
    gained = np.array(out.logits - 2 * plain.read(text)[-1:])
    np.testing.assert_allclose(gained, [7.0 * (np.arange(11) == 4)], atol=1e-5)


def test_what_is_no_processor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be a function .* got 'json'"):
        processed(ToyTarget(), Penalties(), ["json"])
    target = ProcessedTarget(ToyTarget(vocab_size=11), Penalties(), [lambda _, x: x[0]])
    with pytest.raises(ValueError, match=r"\(1, 11\); got \(11,\)"):
        target.prefill(Prompt((1,)), target.make_cache())


def test_a_text_that_nobody_reads_grows_no_graph() -> None:
    target = ProcessedTarget(ToyTarget(vocab_size=11), Penalties(logit_bias={1: 1.0}))
    cache = target.make_cache()
    target.prefill(Prompt((1, 2)), cache)
    for _ in range(5):
        target.verify(TREE, cache)
        cache.commit((0, 1))
    drawing = io.StringIO()
    mx.export_to_dot(drawing, cache.text)
    assert "Concatenate" not in drawing.getvalue()
    assert cache.text.tolist() == [1, 2, *5 * [5, 3]]


def test_everything_else_is_the_targets() -> None:
    plain = ToyTarget(vocab_size=11, hidden_size=8, max_context=30)
    target = ProcessedTarget(plain, Penalties(repetition_penalty=2.0))
    assert (target.vocab_size, target.hidden_size, target.max_context) == (11, 8, 30)
    tokens = mx.array([3, 1])
    assert mx.array_equal(target.embed(tokens), plain.embed(tokens))
    assert mx.array_equal(target.lm_head(plain.embed(tokens)), plain.lm_head(plain.embed(tokens)))
    out = target.prefill(Prompt((1, 2)), target.make_cache())
    assert mx.array_equal(out.hidden, plain.prefill(Prompt((1, 2)), plain.make_cache()).hidden)


def test_a_strangers_cache_is_refused() -> None:
    target = ProcessedTarget(ToyTarget(), Penalties(repetition_penalty=2.0))
    with pytest.raises(TypeError, match="ToyCache"):
        target.verify(TREE, ToyTarget().make_cache())
    with pytest.raises(ValueError, match="after a tree was verified"):
        target.make_cache().commit((0,))
