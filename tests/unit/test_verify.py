"""`verify` finds what is wrong, and nothing else.

Shapes:
    N: rows of a tree.    V: vocabulary.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commands import command, make_drafter
from flash_mlx import accept, cli
from flash_mlx.around import TargetAround
from flash_mlx.cost import Costs
from flash_mlx.decode import Cache, NoDrafter, Output, Take
from flash_mlx.draft import NgramDrafter
from flash_mlx.draft.adaptive import paced
from flash_mlx.joint_law import ReadOnce, compare, law_of_two
from flash_mlx.measure import noise_floor
from flash_mlx.penalties import Penalties
from flash_mlx.processed import ProcessedTarget
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.tree import DraftTree, Topology
from flash_mlx.verify import Report, Settings, diverging, least_certain, num_steps, verify
from identity import ask
from tiny import random_image
from toy import OracleDrafter, RandomDrafter, ToyTarget, exact_law, generate, topologies

V = 8
TARGET = ToyTarget(V, seed=3)
PROMPTS = [Prompt((1, 2)), Prompt((3,)), Prompt((2, 5, 7))]
FORKED = Topology((-1, 0, 0, 1, 1, 2))
WARM = Sampler(temperature=1.0)
TRIED = Settings(max_tokens=24, draws=300)


def found(target: Any, drafter: Any, tried: Settings = TRIED) -> Report:
    return verify(target, drafter, PROMPTS, tried)


@pytest.mark.parametrize(
    "drafter",
    [
        NoDrafter(),
        NgramDrafter(),
        RandomDrafter(Topology.chain(3), V, laws=True, sharpness=2.0),
        RandomDrafter(FORKED, V, laws=True, sharpness=2.0),
        OracleDrafter(FORKED, TARGET, laws=False, corruption=0.3),
    ],
)
@pytest.mark.parametrize("penalised", [False, True])
def test_right_drafting_passes(drafter: Any, penalised: bool) -> None:
    penalties = Penalties(repetition_penalty=1.3, logit_bias={3: -1.0, 4: -np.inf})
    target = ProcessedTarget(TARGET, penalties) if penalised else TARGET
    steps: list[int] = []
    tried = replace(TRIED, draws=100, sampler=Sampler(top_k=6))
    report = verify(target, drafter, PROMPTS, tried, steps.append)
    assert report.passed
    assert report.greedy_identical
    assert report.divergences == ()
    assert (report.prompts, report.tokens) == (3, 72)
    assert len(report.laws) == 2
    assert report.total_variation <= report.noise_floor
    assert sum(steps) == num_steps(3, tried)


def everything(tree: DraftTree, choice: mx.array) -> tuple[mx.array, mx.array]:
    return mx.ones((len(tree),), dtype=mx.bool_), choice


Judged = tuple[mx.array, Callable[[mx.array], mx.array]]


def without_residual(tree: DraftTree, p: mx.array, key: mx.array) -> Judged:
    holds, _ = REJECT(tree, mx.array(p), key)
    return holds, lambda rows: p[rows]


def sampled_everything(tree: DraftTree, p: mx.array, key: mx.array) -> Judged:
    return mx.ones((len(tree),), dtype=mx.bool_), lambda rows: p[rows]


REJECT = accept._reject
CHAIN = RandomDrafter(Topology.chain(3), V, laws=True, sharpness=2.0)
# Without a law, every wrong step shows most where a draft is as likely as not.
ORACLE = OracleDrafter(Topology.chain(2), TARGET, laws=False, corruption=0.0)


@pytest.mark.parametrize(
    ("name", "wrong", "drafter"),
    [
        ("_reject", without_residual, ORACLE),
        ("_reject", sampled_everything, CHAIN),
    ],
)
def test_a_wrong_law_is_found(
    name: str, wrong: Callable[..., Any], drafter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accept, name, wrong)
    tried = replace(TRIED, temperatures=(1.0,), draws=500)
    report = found(TARGET, drafter, tried)
    assert not report.passed
    assert report.greedy_identical is None
    assert report.total_variation > report.noise_floor


class Liar(RandomDrafter):
    """Says that its drafts come from another law than they do."""

    def draft(self, root: int, state: None, sampler: Sampler, key: mx.array) -> DraftTree:
        tree = super().draft(root, state, sampler, key)
        return DraftTree(tree.topology, tree.tokens, mx.full((len(tree), V), 1 / V))


@pytest.mark.parametrize("parked", [False, True])
def test_a_drafter_that_lies_about_its_law_is_found_even_if_it_would_be_parked(
    parked: bool,
) -> None:
    class Stubborn(Liar):
        def draft(self, root: int, state: None, sampler: Sampler, key: mx.array) -> DraftTree:
            return super().draft(root, state, sampler, mx.random.key(1))

    drafter: Any = Stubborn(Topology.chain(2), V, laws=True, sharpness=3.0)
    if parked:  # no draft pays, so none would be made
        dear = Costs(1.0, ((1, 1.0), (2, 9.0)), ((1, 5.0),))
        drafter = paced(drafter, lambda _, greedy: dear)
    report = found(TARGET, drafter)
    assert report.greedy_identical  # ids are compared with the target's: no law is asked
    assert not report.passed


def test_wrong_ids_are_found_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accept, "_follow", everything)
    report = found(TARGET, CHAIN, replace(TRIED, temperatures=(0.0,)))
    assert (report.passed, report.greedy_identical) == (False, False)
    assert report.total_variation is None
    for each in report.divergences:
        prompt = PROMPTS[each.prompt]
        text = generate(TARGET, CHAIN, prompt.tokens, 24)
        logits = TARGET.read([*prompt.tokens, *text[: each.position]])[-1]
        ours, plain = each.tokens
        assert ours == text[each.position] != plain == mx.argmax(logits).item()
        assert each.logit_gap == pytest.approx((logits[plain] - logits[ours]).item(), abs=1e-4)
        assert not each.near_tie
        assert each.pass_gap < 1e-3
    assert {each.prompt for each in report.divergences} == {0, 1, 2}


class Shaken(TargetAround):
    """A pass over several rows differs from one over one row by up to `size`, as rounding does.

    Ids 0 and 1 are both the target's favourite, and `gap` apart.
    """

    def __init__(self, size: float, gap: float) -> None:
        super().__init__(TARGET)
        self.size, self.gap = size, gap

    def prefill(self, prompt: Prompt, cache: Cache, take: Take | None = None) -> Output:
        return self.shake(self.target.prefill(prompt, cache, take))

    def verify(self, tree: DraftTree, cache: Cache) -> Output:
        return self.shake(self.target.verify(tree, cache))

    def shake(self, out: Output) -> Output:
        logits = mx.array(out.logits)
        logits[:, 0] = 9.0
        logits[:, 1] = 9.0 - self.gap
        if logits.shape[0] > 1:
            logits[:, 1] = logits[:, 1] + self.size
        return Output(logits, out.hidden)


@pytest.mark.parametrize(("size", "gap", "ties"), [(1e-4, 5e-5, True), (3.0, 1.0, False)])
def test_a_near_tie_is_told_and_does_no_harm_but_rounding_is_no_excuse_for_more(
    size: float, gap: float, ties: bool
) -> None:
    target = Shaken(size, gap)
    report = found(target, CHAIN, replace(TRIED, temperatures=(0.0,)))
    assert report.greedy_identical is False
    assert report.passed == ties
    assert report.near_ties == (len(report.divergences) if ties else 0)
    for each in report.divergences:
        assert each.tokens == (1, 0)
        assert each.logit_gap == pytest.approx(gap, rel=0.05)
        assert each.pass_gap == pytest.approx(size if ties else 0.02 * 9, rel=0.05)


def test_texts_that_end_apart_differ() -> None:
    plain = tuple(generate(TARGET, NoDrafter(), (1, 2), 6))
    for ours, theirs in ((plain, plain[:4]), (plain[:4], plain)):
        (each,) = diverging(TARGET, 7, Prompt((1, 2)), ours, theirs)
        assert (each.prompt, each.position, each.tokens) == (7, 4, plain[4:5])
        assert (each.logit_gap, each.near_tie) == (None, False)
    assert diverging(TARGET, 0, Prompt((1, 2)), plain, plain) == []


def test_a_plain_text_that_is_wrong_itself_is_told() -> None:
    plain = tuple(generate(TARGET, NoDrafter(), (1, 2), 6))
    other = (*plain[:3], (plain[3] + 1) % V, *plain[4:])
    (each,) = diverging(TARGET, 0, Prompt((1, 2)), plain, other)
    assert (each.position, each.tokens) == (3, (plain[3], other[3]))
    assert each.logit_gap > 0
    assert not each.near_tie


def test_the_law_of_two_tokens_is_the_targets() -> None:
    for sampler in (WARM, Sampler(temperature=0.7, top_p=0.8)):
        read = ReadOnce(TARGET, PROMPTS[0], first=4)
        law = law_of_two(read, 4, sampler)
        exact = exact_law(TARGET, (1, 2, 4), sampler, 2)
        np.testing.assert_allclose(law.first, exact.sum(axis=1), atol=1e-6)
        outcomes = law.outcomes()
        assert outcomes.sum() == pytest.approx(1)
        for x in np.flatnonzero(law.first):
            for y in range(V):
                assert outcomes[law.place(int(x), y)] == pytest.approx(exact[x, y], abs=1e-6)


def test_unlikely_tokens_share_one_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flash_mlx.joint_law.FOLLOWED", 3)
    law = law_of_two(ReadOnce(TARGET, PROMPTS[0], first=4), 4, WARM)
    assert law.second.shape == (3, V)
    alone = [x for x in range(V) if x not in law.followed]
    assert len({law.place(x, y) for x in alone for y in range(V)}) == len(alone) == V - 3
    assert law.outcomes()[law.place(alone[0], 0)] == law.first[alone[0]]
    assert law.outcomes().sum() == pytest.approx(1)


@given(topology=topologies(), first=st.integers(0, V - 1), corruption=st.sampled_from([0.0, 0.4]))
@settings(max_examples=15, deadline=None)
def test_answers_that_begin_behind_a_read_prompt_are_the_same(
    topology: Topology, first: int, corruption: float
) -> None:
    begun = ReadOnce(TARGET, PROMPTS[0], first)
    drafter = OracleDrafter(topology, TARGET, laws=False, corruption=corruption)
    for _ in range(2):  # the second answer begins where the first did
        said = generate(begun, drafter, (1, 2), 9)
        assert said == [first, *generate(TARGET, NoDrafter(), (1, 2, first), 8)]


def test_a_law_is_tested_where_the_target_is_least_certain() -> None:
    plain = [tuple(generate(TARGET, NoDrafter(), prompt.tokens, 10)) for prompt in PROMPTS]
    prompt, first = least_certain(TARGET, PROMPTS, plain, WARM)

    def doubt(tokens: tuple[int, ...]) -> float:
        share = WARM.probs(TARGET.read(tokens)[-1]).max().item()
        return share * (1 - share)

    doubts = {
        (*asked.tokens, *said[: i + 1]): doubt((*asked.tokens, *said[: i + 1]))
        + (doubt((*asked.tokens, *said[: i + 2])) if i + 2 < len(said) else 0)
        for asked, said in zip(PROMPTS, plain, strict=True)
        for i in range(len(said) - 1)
    }
    assert (*prompt.tokens, first) == max(doubts, key=lambda text: doubts[text])
    narrow = ToyTarget(V, seed=3, max_context=4)
    with pytest.raises(ValueError, match="room for three tokens"):
        least_certain(narrow, [Prompt((2, 5))], [(1, 2)], WARM)


def test_what_cannot_happen_is_not_excused() -> None:
    law = np.array([0.5, 0.5, 0.0])
    assert compare(np.array([500.0, 500.0, 0.0]), law, 1, 1.0).passed
    assert not compare(np.array([400.0, 400.0, 200.0]), law, 1, 1.0).passed


def test_chance_stays_below_the_floor_and_not_far_below() -> None:
    rng = np.random.default_rng(0)
    law = rng.dirichlet(np.ones(16))
    distances = [np.abs(rng.multinomial(500, law) / 500 - law).sum() / 2 for _ in range(2000)]
    floor = noise_floor(law, 500)
    assert np.mean(np.array(distances) > floor) <= 1e-3
    assert floor < 3 * np.mean(distances)


@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_tiny_targets_are_proved_with_penalties_on(family: str, request: Any) -> None:
    loaded = request.getfixturevalue(family)
    target = ProcessedTarget(loaded.target, Penalties(repetition_penalty=1.1))
    drafter = RandomDrafter(FORKED, target.vocab_size, laws=True)
    tried = replace(TRIED, max_tokens=12, draws=100, sampler=Sampler(top_p=0.5))
    report = verify(target, drafter, [ask(loaded, 1)], tried)
    assert report.passed
    assert report.greedy_identical
    assert report.drafted > report.accepted


def test_the_command_proves_it(tiny_qwen: Path, tmp_path: Path) -> None:
    drafter = make_drafter(tmp_path / "drafter")
    random_image().save(tmp_path / "picture.png")
    code, out, err = command(
        "verify", "--model", tiny_qwen, "--draft-model", drafter,
        "--image", tmp_path / "picture.png", "--prompt", "What?", "Why?", "--max-tokens", 12,
        "--draws", 100, "--top-p", 0.9, "--repetition-penalty", 1.1, "--json",
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(out)
    assert report["greedy_identical"] is True
    assert (report["prompts"], report["divergences"], report["passed"]) == (2, [], True)
    assert 2 < report["tokens"] <= 24
    assert 0 <= report["total_variation"] <= report["noise_floor"] < 1


def test_the_command_fails_where_drafts_are_believed(
    tiny_llava: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["verify", "--model", str(tiny_llava), "--limit", "1", "--max-tokens", "30"]
    words += ["--temperature", "0", "--draft-model", "ngram", "--prompt", "a b a b a b"]
    words += ["--draft-block-size", "4"]  # whatever it costs here
    assert cli.run(words) == 0
    out = capfd.readouterr().out
    assert "identical: 1 answers, 30 tokens" in out
    assert out.endswith("Passed\n")
    monkeypatch.setattr(accept, "_follow", everything)
    assert cli.run(words) == 1
    out = capfd.readouterr().out
    assert "DIFFERENT" in out
    assert "no tie: logits " in out
    assert "FAILED" in out
