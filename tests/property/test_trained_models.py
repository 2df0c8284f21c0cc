"""Language models that were really trained: a pair of stories' models, and a published text.

The pair shares its characters but not its ids: target id = drafter's id + 256, from id 3 on.
At temperature 1 their laws overlap by 0.9.
"""

import struct
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_vlm.sample_utils import make_logits_processors

from flash_mlx.decode import Drafter, NoDrafter, Round, Target, decode
from flash_mlx.draft import NgramDrafter
from flash_mlx.penalties import Penalties
from flash_mlx.processed import ProcessedTarget
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from law import assert_law
from llama2c import BOS, FOLDER, Llama, LlamaDrafter
from toy import KEY

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the models are not at hand")

NEWLINE = 13  # the target has bytes besides; the drafter does not know this one
OWN_IDS = mx.array([0, 1, 2, *range(259, 361)])  # the target's id of each of the drafter's


@pytest.fixture(scope="module")
def large() -> Llama:
    return Llama(FOLDER / "babyllama361" / "model5000.bin")


@pytest.fixture(scope="module")
def small() -> Llama:
    return Llama(FOLDER / "babyllama105" / "model5000.bin")


def encode(text: str) -> tuple[int, ...]:
    """Return the target's ids of a text."""
    lines = (FOLDER / "babyllama105" / "tok105.vocab").read_text(encoding="utf-8").split("\n")
    own = [line.partition("\t")[0] for line in lines]
    return (BOS, *(own.index(letter) + 256 for letter in text.replace(" ", "▁")))


def run(
    target: Target,
    drafter: Drafter[Any],
    prompt: Sequence[int],
    max_tokens: int,
    sampler: Sampler = Sampler(),  # noqa: B008
    key: mx.array = KEY,
    stop_ids: Sequence[int] = (),
) -> tuple[list[int], list[Round]]:
    """Return the ids of `decode` and its rounds."""
    rounds = list(
        decode(
            target,
            drafter,
            Prompt(tuple(prompt)),
            sampler=sampler,
            key=key,
            max_tokens=max_tokens,
            stop_ids=stop_ids,
        )
    )
    return [token for each in rounds for token in each.tokens], rounds


def test_a_published_text_comes_out() -> None:
    model = Llama(FOLDER / "stories260K" / "stories260K.bin")
    data = (FOLDER / "stories260K" / "tok512.bin").read_bytes()
    pieces, place = [], 4
    while place < len(data):
        _, length = struct.unpack_from("<fi", data, place)
        pieces.append(data[place + 8 : place + 8 + length])
        place += 8 + length
    published = (FOLDER / "stories260K" / "golden_stories260K.md").read_text(encoding="utf-8")
    expected = published.split("-t 0.0\n")[1].split("\n```")[0]
    for drafter in (NoDrafter(), NgramDrafter()):
        tokens, _ = run(model, drafter, (BOS,), 256)
        said = b"".join(pieces[token] for token in tokens).replace(b"<0x0A>", b"\n")
        assert said.decode().removeprefix(" ") == expected


@pytest.mark.parametrize("width", [1, 2])
def test_greedy_drafts_change_nothing(large: Llama, small: Llama, width: int) -> None:
    prompt = encode("Once upon a time")
    drafter = LlamaDrafter(small, OWN_IDS, large.vocab_size, num_drafts=4, width=width)
    tokens, rounds = run(large, drafter, prompt, 200)
    read = mx.argmax(large.read((*prompt, *tokens[:-1])), axis=-1)
    assert tokens == read[len(prompt) - 1 :].tolist()
    accepted = sum(each.num_accepted for each in rounds)
    assert accepted > 0.9 * (len(tokens) - len(rounds))


def test_as_many_drafts_are_accepted_as_the_laws_overlap(large: Llama, small: Llama) -> None:
    # The rule accepts a draft with probability sum(min(p, q)), whatever was said before.
    sampler, num_drafts = Sampler(temperature=1.0), 3
    drafter = LlamaDrafter(small, OWN_IDS, large.vocab_size, num_drafts)
    judged = accepted = 0
    overlaps = []
    for key in mx.random.split(KEY, 6):
        tokens, rounds = run(large, drafter, (BOS,), 220, sampler, key, (BOS, NEWLINE))
        text = [BOS, *tokens[:-1]]
        p = sampler.probs(large.read(text))
        q = mx.zeros_like(p)
        q[:, OWN_IDS] = sampler.probs(small.read(drafter.own(text).tolist()))
        overlap = mx.minimum(p, q).sum(axis=-1).tolist()
        place = 1  # of the first draft's law: the first round is the prefill's
        for each in rounds[1:-1]:
            # The first draft that is rejected ends a round; those after it are not judged.
            num_judged = min(each.num_drafted, each.num_accepted + 1)
            overlaps += overlap[place : place + num_judged]
            judged, accepted = judged + num_judged, accepted + each.num_accepted
            place += len(each.tokens)
    expected = np.array(overlaps)
    deviation = np.sqrt((expected * (1 - expected)).sum()) / judged
    assert abs(accepted / judged - expected.mean()) < 4 * deviation
    assert judged > 500
    assert 0.86 < accepted / judged < 0.95  # about 0.92 of long texts; six short ones vary


def joint_law(
    model: Llama, prompt: Sequence[int], sampler: Sampler, penalties: dict[str, Any]
) -> np.ndarray:
    """Return [V, V], the law of the second and third token, re-reading the text for each."""
    law = {(): 1.0}
    for _ in range(3):
        longer = {}
        for said, share in law.items():
            logits = model.read((*prompt, *said))[-1:]
            for processor in make_logits_processors(**penalties):
                logits = processor(mx.array((prompt[-1], *said)), logits)
            row = np.array(sampler.probs(logits)[0], dtype=np.float64)
            row *= share / row.sum()
            longer |= {(*said, token): row[token] for token in np.flatnonzero(row).tolist()}
        law = longer
    table = np.zeros((model.vocab_size, model.vocab_size))
    for (_, second, third), share in law.items():
        table[second, third] += share
    return table


def test_two_tokens_in_a_row_have_the_targets_joint_law(large: Llama, small: Llama) -> None:
    # The first token is the prefill's, a space; what follows may be many things.
    prompt = encode("He saw the")
    sampler = Sampler(temperature=1.0, top_p=0.9)
    penalties: dict[str, Any] = {"repetition_penalty": 0.7, "logit_bias": {encode("o")[1]: 1.5}}
    target = ProcessedTarget(large, Penalties(**penalties))
    drafter = LlamaDrafter(small, OWN_IDS, large.vocab_size, num_drafts=2, width=2)
    counts = np.zeros((large.vocab_size, large.vocab_size))
    for key in mx.random.split(mx.random.key(3), 300):
        tokens, _ = run(target, drafter, prompt, 3, sampler, key)
        counts[tokens[1], tokens[2]] += 1
    law = joint_law(large, prompt, sampler, penalties)
    assert np.abs(law - joint_law(large, prompt, sampler, {})).sum() / 2 > 0.4
    assert_law(counts, law)
