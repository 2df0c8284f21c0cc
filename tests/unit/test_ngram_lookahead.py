"""Text that does not repeat is decoded as plainly as without a drafter, passes ahead included."""

import mlx.core as mx
import pytest

from flash_mlx.decode import decode
from flash_mlx.draft import NgramDrafter, NgramState
from flash_mlx.draft.ngram import PATIENCE
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from toy import GREEDY, KEY, ToyTarget, generate, greedy_oracle

NO_HIDDEN = mx.zeros((1, 1))
DRAFTER = NgramDrafter()


def hint(state: NgramState) -> bool:
    return DRAFTER.draft(0, state, GREEDY, KEY).lookahead


def test_a_few_rounds_without_a_match_hint_that_there_is_none_next() -> None:
    state = DRAFTER.prefill(Prompt((1, 2)), NO_HIDDEN, 3)
    hints = [hint(state)]
    for token in range(4, 4 + PATIENCE):
        state = DRAFTER.extend(NO_HIDDEN, (token,), state)
        hints.append(hint(state))
    assert hints == [False] * (PATIENCE - 1) + [True, True]
    matched = DRAFTER.extend(NO_HIDDEN, (2,), state)
    assert matched.drafts
    assert not hint(matched)
    assert not hint(DRAFTER.extend(NO_HIDDEN, (99,), matched))  # the count begins anew
    assert hint(state)  # a value, whatever came after it


@pytest.mark.parametrize("sampler", [GREEDY, Sampler(temperature=1)])
@pytest.mark.parametrize("vocab_size", [11, 60])
def test_right_and_wrong_hints_change_no_token(sampler: Sampler, vocab_size: int) -> None:
    class Unhinted(NgramDrafter):
        def _state(self, text, misses=0):  # type: ignore[no-untyped-def]
            return super()._state(text, misses=-100)

    wasted = 0
    for seed in range(4):
        target, key = ToyTarget(vocab_size, seed=seed), mx.random.key(seed)
        prompt = Prompt((1, 2, 3))
        rounds = list(
            decode(target, DRAFTER, prompt, sampler=sampler, key=key, max_tokens=60, stop_ids=())
        )
        said = [token for each in rounds for token in each.tokens]
        wasted += target.passes - (len(rounds) - 1)
        expected = generate(target, Unhinted(), prompt.tokens, 60, sampler=sampler, key=key)
        assert said == expected
        if sampler.greedy:
            assert said == greedy_oracle(target, prompt.tokens, 60)
    if vocab_size == 60 and not sampler.greedy:
        assert 0 < wasted < 30  # some hints were wrong, at one pass each
