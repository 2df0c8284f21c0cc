"""Every family of targets on a tiny checkpoint of its own: passes, prompts and identity.

The checkpoints have the layout, the processor classes and the kinds of layers of the published
ones, and random weights (`tiny`).
"""

from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from flash_mlx.decode import NoDrafter, Output
from flash_mlx.draft import FlashConfig, FlashDrafter, FlashModel
from flash_mlx.processing import make_prompt
from flash_mlx.prompt import Prompt
from flash_mlx.targets import FAMILIES, LoadedTarget, MlxVlmTarget, anyres, load_target
from flash_mlx.targets.selftest import check_joined
from flash_mlx.targets.stock import stock_inputs
from flash_mlx.tree import Topology
from identity import ask, mlx_vlm_ids, run
from passes import TREE, after, assert_same, mixed_trees, one_by_one, paths, random_tokens, tree_of
from tiny import (
    BUILDERS,
    build_gemma3,
    build_llava_next,
    build_mistral3,
    build_paligemma,
    edit_json,
    random_image,
    small_tower,
)

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
    # Tiles of 4 rows in the grid of at most 4 that is closest to the picture's sides, and the
    # whole picture unless that is it.
    "internvl_chat": (4, 4 * 5, 4 * 5),
    "pixtral": (7 * 5, 6 * 8, 8 * 2),  # patches of 14; the longer side is at most 112
    "mistral3": (4 * 3, 3 * 4, 4 * 1),  # of 28
    "paligemma": (16, 16, 16),  # 56 x 56, patches of 14
    "llava_qwen2": (4, 4, 4),  # 128 x 128, squares of 64
}
# The same family under two names; its checkpoints are tested under the published one.
OTHER_NAMES = {"fastvlm"}
MAX_TOKENS = 32


@pytest.fixture
def loaded(family: LoadedTarget) -> LoadedTarget:
    return family


@pytest.fixture(params=[0, 1, 2], ids=["text", "image", "two-images"])
def num_images(request: pytest.FixtureRequest, loaded: LoadedTarget) -> int:
    fewest, most = loaded.family.num_images
    if request.param < fewest or (most is not None and request.param > most):
        with pytest.raises(ValueError, match=f"must have {fewest} image.s.; got {request.param}"):
            ask(loaded, request.param)
        pytest.skip("which the family cannot read, and says so")
    return int(request.param)


def test_every_family_has_a_checkpoint_here() -> None:
    assert FAMILIES.keys() - OTHER_NAMES == BUILDERS.keys() == ROWS.keys()


def test_plain_decoding_says_what_mlx_vlm_says(
    loaded: LoadedTarget, num_images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = ask(loaded, num_images)
    ids, *_ = run(loaded.target, NoDrafter(), prompt, MAX_TOKENS)
    assert ids == mlx_vlm_ids(loaded, prompt, MAX_TOKENS, monkeypatch)
    assert len(set(ids)) > 3  # not one id repeated, which any mistake could say too


def test_logits_are_the_language_models_own(loaded: LoadedTarget) -> None:
    target = loaded.target
    prompt = Prompt(tuple(random_tokens(target, 12)))
    ids = mx.array(prompt.tokens)[None]
    positions = mx.broadcast_to(mx.arange(12), (3, 1, 12))
    given = {"position_ids": positions} if loaded.family.mrope else {}
    caches = target.make_cache().layers
    expected = target.model.language_model(ids, cache=caches, **given).logits[0, -1:]
    ours = target.prefill(prompt, target.make_cache()).logits
    assert mx.allclose(ours, expected, rtol=1e-5, atol=1e-5)


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
    prompt = ask(loaded, loaded.family.num_images[1] or 2)
    whole, chunked = (
        MlxVlmTarget(loaded.target.model, loaded.family, chunk_size=size) for size in (4096, 7)
    )
    expected = whole.prefill(prompt, whole.make_cache())
    assert_same(chunked.prefill(prompt, chunked.make_cache()), expected)


def test_the_template_is_the_checkpoints_own(loaded: LoadedTarget) -> None:
    if not loaded.family.system:  # PaliGemma has no template: rows, <bos>, text, a line feed
        with pytest.raises(ValueError, match="no system message"):
            make_prompt(loaded, "What is this?", [random_image()], system="Be brief.")
        text = loaded.processor.tokenizer("<bos>What is this?\n")["input_ids"]
        expected = [loaded.image_token_id] * 16 + text
        assert make_prompt(loaded, "What is this?", [random_image()]).tokens == tuple(expected)
        return
    said = (("system", "Be brief."), ("user", "What is this?"))
    strings = loaded.family.template_as == "llava_qwen2"  # templates that take no parts
    messages = [
        {"role": role, "content": text if strings else [{"type": "text", "text": text}]}
        for role, text in said
    ]
    expected = loaded.processor.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert make_prompt(loaded, "What is this?", system="Be brief.").tokens == tuple(expected)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_spans_hold_the_visual_rows_of_their_image(loaded: LoadedTarget, first: int) -> None:
    some = slice(first, first + (loaded.family.num_images[1] or 2))
    images = [random_image(*size, seed=i) for i, size in enumerate(SIZES)][some]
    prompt = make_prompt(loaded, "Compare.", images)
    is_visual = [token == loaded.image_token_id for token in prompt.tokens]
    counts = tuple(sum(is_visual[start:stop]) for start, stop in prompt.image_spans)
    assert counts == ROWS[loaded.model_type][some]
    assert sum(counts) == sum(is_visual)
    for start, stop in prompt.image_spans:
        assert is_visual[start]
        assert is_visual[stop - 1]


def test_each_image_changes_its_own_rows_only(loaded: LoadedTarget) -> None:
    images = [random_image(70, 90, seed=i) for i in range(3)]
    before = images[: (loaded.family.num_images[1] or 2) - 1]
    prompt, other = (make_prompt(loaded, "Compare.", [*before, image]) for image in images[1:])
    here, there = (loaded.target._decoder.read(each).embeds[0] for each in (prompt, other))
    changed = [row for row, same in enumerate(mx.all(here == there, axis=-1).tolist()) if not same]
    start, stop = prompt.image_spans[-1]
    rows = [row for row in range(start, stop) if prompt.tokens[row] == loaded.image_token_id]
    assert set(changed) <= set(rows)
    assert len(changed) >= len(rows) - 8  # the learned ends of LLaVA-NeXT's 8 lines are the same
    assert len(changed) >= 4


def test_the_drafters_embedding_is_what_the_layers_receive(loaded: LoadedTarget) -> None:
    target = loaded.target
    prompt = Prompt(tuple(random_tokens(target, 5)))
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


def test_a_window_that_is_narrower_than_the_tree_goes_by_positions(tmp_path: Path) -> None:
    loaded = load_target(build_gemma3(tmp_path / "gemma", sliding_window=2))
    target, prompt = loaded.target, ask(loaded, 1)
    assert target.supports_tree
    tokens = random_tokens(target, len(TREE))
    out = target.verify(tree_of(TREE, tokens), after(target, prompt))
    for path in paths(TREE):
        rows = mx.array(path)
        expected = one_by_one(target, prompt, [tokens[row] for row in path])
        assert_same(Output(out.logits[rows], out.hidden[rows]), expected)


def test_paligemma_2_bends_its_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_target(build_paligemma(tmp_path / "paligemma-2", text="gemma2"))
    target, prompt = loaded.target, ask(loaded, 1)
    ids, *_ = run(target, NoDrafter(), prompt, MAX_TOKENS)
    assert ids == mlx_vlm_ids(loaded, prompt, MAX_TOKENS, monkeypatch)
    tokens = random_tokens(target, len(TREE))
    out = target.verify(tree_of(TREE, tokens), after(target, prompt))
    path = paths(TREE)[-1]
    rows = mx.array(path)
    expected = one_by_one(target, prompt, [tokens[row] for row in path])
    assert_same(Output(out.logits[rows], out.hidden[rows]), expected)
    assert float(mx.abs(target.lm_head(out.hidden * 100)).max()) <= 3.0


def test_a_prompt_that_is_read_at_once_needs_a_new_cache(tmp_path: Path) -> None:
    loaded = load_target(build_paligemma(tmp_path / "paligemma"))
    prompt = ask(loaded, 1)
    cache = after(loaded.target, prompt)
    longer = Prompt((*prompt.tokens, 5), prompt.image_spans, prompt.inputs)
    with pytest.raises(ValueError, match="reads a prompt at once"):
        loaded.target.prefill(longer, cache)


def test_ministral_3_takes_chains_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_target(build_mistral3(tmp_path / "ministral", text="ministral3"))
    target, prompt = loaded.target, ask(loaded, 1)
    ids, *_ = run(target, NoDrafter(), prompt, MAX_TOKENS)
    assert ids == mlx_vlm_ids(loaded, prompt, MAX_TOKENS, monkeypatch)
    tokens = random_tokens(target, 20)
    chain = target.verify(tree_of(Topology.chain(19), tokens), after(target, prompt))
    assert_same(chain, one_by_one(target, prompt, tokens))
    assert not target.supports_tree
    with pytest.raises(ValueError, match="takes chains only"):
        target.verify(tree_of(TREE, tokens[: len(TREE)]), after(target, prompt))


def test_one_fastvlm_picture_is_placed_as_mlx_vlm_places_it(tmp_path: Path) -> None:
    with small_tower():
        loaded = load_target(BUILDERS["llava_qwen2"](tmp_path / "fastvlm"))
    prompt = ask(loaded, 1)
    stock = stock_inputs(loaded, prompt)
    theirs = loaded.target.model.get_input_embeddings(stock["input_ids"], stock["pixel_values"])
    ours = loaded.target._decoder.read(prompt).embeds
    assert mx.allclose(ours, theirs.inputs_embeds, atol=1e-5)


@pytest.mark.parametrize("size", [(90, 70), (90, 120), (200, 30), (30, 200), (112, 112)])
def test_tiles_are_packed_as_mlx_vlms_onevision_packs_them(size: tuple[int, int]) -> None:
    from mlx_vlm.models.llava_onevision.llava_onevision import Model

    pinpoints = [[56, 112], [112, 56], [112, 112]]
    onevision = SimpleNamespace(
        patches_per_side=4,
        max_num_patches=10**6,  # no shrinking, as in LLaVA-NeXT
        image_newline=mx.random.normal((6,)),
        config=SimpleNamespace(
            image_grid_pinpoints=pinpoints, vision_config=SimpleNamespace(image_size=56)
        ),
    )
    config = {"vision_config": {"image_size": 56}, "image_grid_pinpoints": pinpoints}
    inputs = anyres.prepare(config, {"image_sizes": mx.array([size])})
    grid = np.array(inputs[anyres.GRIDS])[0].tolist()
    tiles = mx.random.normal((1 + grid[0] * grid[1], 16, 6))
    (expected,) = Model.pack_image_features(onevision, [tiles], [list(size)])
    ours = anyres._pack(tiles, list(size), grid, onevision.image_newline)
    assert ours.shape == expected.shape
    assert mx.array_equal(ours, expected)


def test_grids_of_tiles_that_are_not_said_are_asked_for(tmp_path: Path) -> None:
    folder = build_llava_next(tmp_path / "next")
    edit_json(folder, "config.json", image_grid_pinpoints=None)
    with pytest.raises(ValueError, match="image_grid_pinpoints"):
        make_prompt(load_target(folder), "What?", [random_image()])


def test_a_joined_pass_says_what_each_pass_says(loaded: LoadedTarget) -> None:
    target = loaded.target
    fewest, most = loaded.family.num_images
    prompts = [ask(loaded, count) for count in (0, 1, 2) if fewest <= count <= (most or 2)] * 2
    trees = mixed_trees(target, len(prompts))
    caches = [after(target, prompt) for prompt in prompts]
    if not target.joins:
        assert loaded.family.prefix or loaded.family.sliding or not target.supports_tree
        assert not check_joined(target)
        with pytest.raises(ValueError, match="one text at a time"):
            target.verify_together(trees, caches)
        return
    assert check_joined(target)
    alone = [target.verify(tree, cache) for tree, cache in zip(trees, caches, strict=True)]
    mx.eval([out.logits for out in alone])  # before the joined rows take the place of theirs
    for out, expected in zip(target.verify_together(trees, caches), alone, strict=True):
        assert_same(out, expected)
    for tree, cache, prompt in zip(trees, caches, prompts, strict=True):
        rows, other = (0, 1)[: len(tree)], after(target, prompt)
        target.verify(tree, other)
        for each in (cache, other):
            each.commit(rows)
        token = tree_of(Topology.chain(0), [7])
        assert_same(target.verify(token, cache), target.verify(token, other))
