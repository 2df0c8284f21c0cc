"""Every family of targets on a tiny checkpoint of its own: passes, prompts and identity.

The checkpoints have the layout, the processor classes and the kinds of layers of the published
ones, and random weights (`tiny`).
"""

from pathlib import Path

import mlx.core as mx
import pytest

from flash_mlx.decode import NoDrafter, Output
from flash_mlx.draft import FlashConfig, FlashDrafter, FlashModel
from flash_mlx.processing import make_prompt
from flash_mlx.targets import FAMILIES, LoadedTarget, MlxVlmTarget, load_target
from flash_mlx.tree import Topology
from identity import SHAPES, CorruptedOracle, ask, mlx_vlm_ids, run
from passes import TREE, after, assert_same, one_by_one, paths, random_tokens, tree_of
from tiny import BUILDERS, random_image

# Visual rows of pictures of 70 x 90, 120 x 90 and 30 x 200 pixels, counted by hand: what each
# family's paper or processor says for the sizes of the tiny checkpoint.
SIZES = ((70, 90), (120, 90), (30, 200))
ROWS = {
    "llava": (16, 16, 16),  # 56 x 56, patches of 14
    # The overview's 16; of 8 x 8 or 8 x 4 patches those not filled up, and one row a line.
    "llava_next": (16 + 8 * 7, 16 + 6 * 9, 16 + 8 * 3),
    # The same, but 8 x 6 and 6 x 8 patches exceed 2 tiles of 16 and are shrunk by sqrt(1.5).
    "llava_onevision": (16 + 6 * 5, 16 + 4 * 7, 16 + 8 * 3),
    "qwen2_vl": (2 * 3, 4 * 3, 1 * 7),  # sides rounded to multiples of 28
    "qwen2_5_vl": (2 * 3, 4 * 3, 1 * 7),
    "qwen3_vl": (2 * 3, 4 * 3, 1 * 6),  # of 32
    "gemma3": (4, 4, 4),
    # Tiles of 4 rows: the longer side becomes 112, both are rounded up to multiples of 56, and
    # the whole picture is one more.
    "idefics3": (4 * 5, 4 * 5, 4 * 3),
    "smolvlm": (4 * 5, 4 * 5, 4 * 3),
}
MAX_TOKENS = 32


@pytest.fixture(scope="module", params=BUILDERS)
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> LoadedTarget:
    folder: Path = tmp_path_factory.mktemp("family") / request.param
    return load_target(BUILDERS[request.param](folder))


@pytest.fixture(params=[0, 1, 2], ids=["text", "image", "two-images"])
def num_images(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def test_every_family_has_a_checkpoint_here() -> None:
    assert FAMILIES.keys() == BUILDERS.keys() == ROWS.keys()


def test_plain_decoding_says_what_mlx_vlm_says(
    loaded: LoadedTarget, num_images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = ask(loaded, num_images)
    ids, *_ = run(loaded.target, NoDrafter(), prompt, MAX_TOKENS)
    assert ids == mlx_vlm_ids(loaded, prompt, MAX_TOKENS, monkeypatch)
    assert len(set(ids)) > 3  # not one id repeated, which any mistake could say too


@pytest.mark.parametrize("shape", SHAPES)
def test_drafts_change_nothing(loaded: LoadedTarget, shape: str, num_images: int) -> None:
    prompt = ask(loaded, num_images)
    expected, *_ = run(loaded.target, NoDrafter(), prompt, MAX_TOKENS)
    oracle = CorruptedOracle(tuple(expected), SHAPES[shape], loaded.target.vocab_size)
    ids, accepted, rejected = run(loaded.target, oracle, prompt, MAX_TOKENS)
    assert ids == expected
    assert accepted >= 8
    assert rejected >= 8


def test_a_random_flash_drafter_changes_nothing(loaded: LoadedTarget, num_images: int) -> None:
    mx.random.seed(0)
    target = loaded.target
    config = FlashConfig(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        num_heads=2,
        head_dim=16,
        block_size=3,
        num_latents=4,
    )
    drafter = FlashDrafter(FlashModel(config), target.embed, target.lm_head)
    prompt = ask(loaded, num_images)
    expected, *_ = run(target, NoDrafter(), prompt, MAX_TOKENS)
    ids, accepted, rejected = run(target, drafter, prompt, MAX_TOKENS)
    assert ids == expected
    assert accepted + rejected >= MAX_TOKENS // 2  # drafts were read


def test_chains_trees_and_commits_say_what_single_rows_say(
    loaded: LoadedTarget, num_images: int
) -> None:
    target = loaded.target
    assert target.supports_tree
    prompt = ask(loaded, num_images)
    tokens = random_tokens(target, len(TREE) + 1)
    chain = target.verify(tree_of(Topology.chain(5), tokens[:6]), after(target, prompt))
    assert_same(chain, one_by_one(target, prompt, tokens[:6]))
    for path in paths(TREE)[-3:]:
        cache = after(target, prompt)
        out = target.verify(tree_of(TREE, tokens[:-1]), cache)
        cache.commit(path)
        last = target.verify(tree_of(Topology.chain(0), tokens[-1:]), cache)
        rows = mx.array(path)
        joined = Output(
            mx.concatenate([out.logits[rows], last.logits]),
            mx.concatenate([out.hidden[rows], last.hidden]),
        )
        read = [*(tokens[row] for row in path), tokens[-1]]
        assert_same(joined, one_by_one(target, prompt, read))


def test_chunks_read_what_one_pass_reads(loaded: LoadedTarget) -> None:
    prompt = ask(loaded, 2)
    whole, chunked = (
        MlxVlmTarget(loaded.target.model, loaded.family, chunk_size=size) for size in (4096, 7)
    )
    expected = whole.prefill(prompt, whole.make_cache())
    assert_same(chunked.prefill(prompt, chunked.make_cache()), expected)


def test_the_template_is_the_checkpoints_own(loaded: LoadedTarget) -> None:
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "What is this?"}]},
    ]
    expected = loaded.processor.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert make_prompt(loaded, "What is this?", system="Be brief.").tokens == tuple(expected)


@pytest.mark.parametrize("first", [0, 1])
def test_spans_hold_the_visual_rows_of_their_image(loaded: LoadedTarget, first: int) -> None:
    images = [random_image(*size, seed=i) for i, size in enumerate(SIZES)][first : first + 2]
    prompt = make_prompt(loaded, "Compare.", images)
    is_visual = [token == loaded.image_token_id for token in prompt.tokens]
    counts = tuple(sum(is_visual[start:stop]) for start, stop in prompt.image_spans)
    assert counts == ROWS[loaded.model_type][first : first + 2]
    assert sum(counts) == sum(is_visual)
    for start, stop in prompt.image_spans:
        assert is_visual[start]
        assert is_visual[stop - 1]


def test_each_image_changes_its_own_rows_only(loaded: LoadedTarget) -> None:
    images = [random_image(70, 90, seed=i) for i in range(3)]
    here, there = (
        loaded.target._decoder.read(make_prompt(loaded, "Compare.", pair)).embeds[0]
        for pair in ((images[0], images[1]), (images[0], images[2]))
    )
    prompt = make_prompt(loaded, "Compare.", images[:2])
    changed = [row for row, same in enumerate(mx.all(here == there, axis=-1).tolist()) if not same]
    start, stop = prompt.image_spans[1]
    rows = [row for row in range(start, stop) if prompt.tokens[row] == loaded.image_token_id]
    ends = 8 if loaded.family.image_rows or loaded.model_type == "llava_onevision" else 0
    assert set(changed) <= set(rows)
    assert len(changed) >= len(rows) - ends  # the learned ends of lines are the same


def test_the_drafters_embedding_is_what_the_layers_receive(loaded: LoadedTarget) -> None:
    target = loaded.target
    prompt = make_prompt(loaded, "What?")
    received: list[mx.array] = []
    layer = target._decoder.stack.layers[0]
    plain = layer.__class__

    def listen(self: object, x: mx.array, *args: object, **kwargs: object) -> object:
        received.append(x)
        return plain.__call__(self, x, *args, **kwargs)

    layer.__class__ = type("Listening", (plain,), {"__call__": listen})
    try:
        target.prefill(prompt, target.make_cache())
    finally:
        layer.__class__ = plain
    assert mx.allclose(received[0][0], target.embed(mx.array(prompt.tokens)), rtol=1e-6)
