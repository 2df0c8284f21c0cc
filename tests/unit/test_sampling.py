import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_mlx.sampling import Sampler, draw
from toy import steady

LAW = np.array([0.1, 0.4, 0.2, 0.3])
LOGITS = mx.array(np.log(LAW).astype(np.float32))


def probs(sampler: Sampler, logits: mx.array = LOGITS) -> list[float]:
    return [round(p, 4) for p in np.array(sampler.probs(logits)).tolist()]


def reference(sampler: Sampler, logits: np.ndarray) -> np.ndarray:
    """One row in float64, with loops: temperature, top-k, top-p, min-p."""
    p = np.exp((logits - logits.max()) / sampler.temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    if sampler.top_k:
        p[order[sampler.top_k :]] = 0
        p /= p.sum()
    above = 0.0
    for token in order:
        probability = p[token]
        if above >= sampler.top_p:
            p[token] = 0
        above += probability
    p[p < sampler.min_p * p.max()] = 0
    return p / p.sum()


def test_greedy_takes_the_largest_and_among_equals_the_lowest_id() -> None:
    assert Sampler().greedy
    logits = mx.array([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    assert np.array(Sampler().probs(logits)).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    assert Sampler().sample(logits, mx.random.key(0)).tolist() == [1, 0]


def test_plain_sampling_is_the_softmax() -> None:
    assert probs(Sampler(temperature=1)) == [0.1, 0.4, 0.2, 0.3]


def test_temperature_divides_the_logits() -> None:
    squares = LAW**2 / (LAW**2).sum()
    assert probs(Sampler(temperature=0.5)) == np.round(squares, 4).tolist()


def test_top_k_keeps_the_k_most_likely() -> None:
    assert probs(Sampler(temperature=1, top_k=2)) == [0, 0.5714, 0, 0.4286]
    assert probs(Sampler(temperature=1, top_k=9)) == [0.1, 0.4, 0.2, 0.3]


@pytest.mark.parametrize(
    ("top_p", "law"),
    [
        (0.3, [0, 1, 0, 0]),
        (0.5, [0, 0.5714, 0, 0.4286]),  # 0.4 does not reach 0.5: the token that crosses stays
        (0.8, [0, 0.4444, 0.2222, 0.3333]),
        (1.0, [0.1, 0.4, 0.2, 0.3]),
    ],
)
def test_top_p_keeps_the_token_that_crosses(top_p: float, law: list[float]) -> None:
    assert probs(Sampler(temperature=1, top_p=top_p)) == law


def test_min_p_is_relative_to_the_most_likely() -> None:
    assert probs(Sampler(temperature=1, min_p=0.45)) == [0, 0.4444, 0.2222, 0.3333]


def test_top_p_is_a_share_of_what_top_k_left() -> None:
    # Of (0.571, 0.429), the first alone reaches 0.5; of the full law it would not.
    assert probs(Sampler(temperature=1, top_k=2, top_p=0.5)) == [0, 1, 0, 0]


def test_filters_see_the_law_after_temperature() -> None:
    # Squared and normalised, 0.4 becomes 0.533 and reaches the share alone.
    assert probs(Sampler(temperature=0.5, top_p=0.5)) == [0, 1, 0, 0]


def test_equals_of_the_last_one_kept_are_kept() -> None:
    assert probs(Sampler(temperature=1, top_k=1), mx.array([1.0, 1.0, 0.0])) == [0.5, 0.5, 0]


@steady
@given(
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_all_rows_at_once_agree_with_loops(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    sampler = Sampler(temperature, top_p, top_k, min_p)
    logits = np.random.default_rng(seed).normal(scale=3, size=(3, 2, 9)).astype(np.float32)
    law = np.array(sampler.probs(mx.array(logits)))
    assert law.dtype == np.float32
    for row, expected in zip(law.reshape(-1, 9), logits.reshape(-1, 9), strict=True):
        np.testing.assert_allclose(row, reference(sampler, expected.astype(float)), atol=1e-6)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_logits_give_float32_laws(dtype: mx.Dtype) -> None:
    law = Sampler(temperature=0.7, top_p=0.9).probs(LOGITS.astype(dtype))
    assert law.dtype == mx.float32
    assert float(law.sum()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("temperature", [1e-45, 1e-8, 1e8])
def test_extreme_temperatures_stay_laws(temperature: float) -> None:
    law = np.array(Sampler(temperature).probs(mx.array([1000.0, -1000.0, 999.0, -np.inf])))
    assert np.isfinite(law).all()
    assert law.sum() == pytest.approx(1, abs=1e-6)
    assert law[0] == (1 if temperature < 1 else pytest.approx(1 / 3, abs=1e-4))


def test_draws_follow_the_law_and_the_key() -> None:
    rows = mx.broadcast_to(LOGITS, (20000, 4))
    drawn = np.array(Sampler(temperature=1, top_k=3).sample(rows, mx.random.key(3)))
    law = np.array(probs(Sampler(temperature=1, top_k=3)))
    # Three standard deviations of a share of 20000 draws: 0.011 at most.
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 20000, law, atol=0.011)
    again = np.array(Sampler(temperature=1, top_k=3).sample(rows, mx.random.key(3)))
    assert (drawn == again).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_plain_and_drafted_rows_are_drawn_by_one_rule(temperature: float) -> None:
    sampler, key = Sampler(temperature=temperature), mx.random.key(3)
    logits = mx.random.normal((200, 40), key=mx.random.key(4))
    assert sampler.sample(logits, key).tolist() == draw(sampler.probs(logits), key).tolist()


def test_what_has_no_probability_is_never_drawn() -> None:
    rows = mx.broadcast_to(mx.array([0.0, 1.0, 0.0, 2.0]), (20000, 4))
    assert set(np.array(draw(rows, mx.random.key(0))).tolist()) == {1, 3}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("top_k", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("temperature", "hot"),
        ("top_p", "x"),
        ("top_k", "many"),
        ("top_k", True),
        ("top_k", float("inf")),
        ("min_p", "x"),
    ],
)
def test_values_out_of_range_or_of_another_type_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"must be.*got {value}"):
        Sampler(**{field: value})


def test_a_whole_top_k_may_be_written_as_a_float() -> None:
    sampler = Sampler(temperature=1, top_k=2.0)
    assert isinstance(sampler.top_k, int)
    assert probs(sampler) == [0, 0.5714, 0, 0.4286]
