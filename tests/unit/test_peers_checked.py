"""Published kinds of drafters: `verify` proves them, and broken weights are noticed."""

import mlx.core as mx
import pytest
from mlx.utils import tree_map

from flash_mlx.cost import Costs
from flash_mlx.decode import NoDrafter, decode
from flash_mlx.draft.adaptive import paced
from flash_mlx.loading import read_by
from flash_mlx.sampling import Sampler
from flash_mlx.targets import LoadedTarget
from flash_mlx.verify import Settings, verify
from identity import ask, run
from peers_reference import CONFIGS, drafter_for

FREE = Costs(1.0, ((1, 1.0), (12, 1.0)), ((1, 0.01), (3, 0.01)))
TRIED = Settings(max_tokens=8, draws=100, sampler=Sampler(top_p=0.8))


KINDS = [(kind, num_nodes) for kind in CONFIGS for num_nodes in (7, 0)]


@pytest.mark.parametrize(
    ("kind", "num_nodes"),
    [KINDS[0], *(pytest.param(*each, marks=pytest.mark.slow) for each in KINDS[1:])],
)
def test_verify_proves_every_kind(llava: LoadedTarget, kind: str, num_nodes: int) -> None:
    drafter = drafter_for(kind, llava, num_nodes=num_nodes, top_k=3)
    report = verify(read_by(drafter, llava).target, drafter, [ask(llava, 1)], TRIED)
    assert report.passed
    assert report.greedy_identical
    assert report.drafted > report.accepted
    assert [law.tokens for law in report.laws] == [1, 2]


@pytest.mark.parametrize("pacing", [True, False], ids=["paced", "fixed"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("num_nodes", [0, 7], ids=["chain", "tree"])
def test_broken_weights_are_noticed(
    llava: LoadedTarget, num_nodes: int, temperature: float, pacing: bool
) -> None:
    drafter = drafter_for("eagle", llava, num_nodes=num_nodes, top_k=3)
    drafter.model.update(tree_map(lambda weight: weight * mx.nan, drafter.model.parameters()))
    target, prompt = read_by(drafter, llava).target, ask(llava, 1)
    if pacing:
        drafter = paced(drafter, lambda _, greedy: FREE)
    rounds = decode(
        target,
        drafter,
        prompt,
        sampler=Sampler(temperature),
        key=mx.random.key(0),
        max_tokens=20,
        stop_ids=(),
    )
    with pytest.warns(RuntimeWarning, match="goes on without it") as caught:
        ids = [token for each in rounds for token in each.tokens]
    assert len(caught) == 1
    assert len(ids) == 20
    if temperature == 0:
        assert ids == run(target, NoDrafter(), prompt, 20)[0]
