"""Kernels in their places: a quantised model with every kernel emulated says the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from emulator import QUICK, Emulator
from flash_mlx.decode import decode
from flash_mlx.draft import FlashConfig, FlashDrafter, FlashModel
from flash_mlx.kernels import dispatch, metal
from flash_mlx.kernels.lmhead_topk import most_likely
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.targets.adapter import MlxVlmTarget
from flash_mlx.targets.families import FAMILIES
from flash_mlx.targets.quantized import FewRowsLinear, use_few_rows
from flash_mlx.tree import DraftTree, Topology

# Rows 3 to 42 stand for an image, of which the drafter reads four latents.
PROMPT = Prompt(tuple(range(1, 60)), image_spans=((3, 43),))
BUSHY = Topology((-1, 0, 0, 0, 1, 2, 3))
VOCAB_SIZE, SIZE, MAX_TOKENS = 300, 128, 12


def make_target(model_type: str) -> MlxVlmTarget:
    """A model of two layers with random 4-bit weights, whose heads fit the kernels."""
    text = {
        "hidden_size": SIZE,
        "num_hidden_layers": 2,
        "intermediate_size": 256,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCAB_SIZE,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
    }
    vision = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64}
    if model_type == "llava":
        from mlx_vlm.models.llava import Model, ModelConfig, TextConfig, VisionConfig

        text |= {"model_type": "llama"}
        vision |= {"model_type": "clip_vision_model", "num_attention_heads": 2}
        vision |= {"image_size": 56, "patch_size": 14, "projection_dim": 32}
        more = {"image_token_index": 299}
    else:
        from mlx_vlm.models.qwen2_5_vl import Model, ModelConfig, TextConfig, VisionConfig

        sections = {"type": "mrope", "mrope_section": [8, 12, 12]}
        text |= {"model_type": "qwen2_5_vl", "rope_scaling": sections}
        vision |= {"model_type": "qwen2_5_vl", "depth": 1, "num_heads": 2, "out_hidden_size": SIZE}
        more = {"image_token_id": 299}
    mx.random.seed(7)
    model = Model(
        ModelConfig(
            text_config=TextConfig.from_dict(text),
            vision_config=VisionConfig.from_dict(vision),
            model_type=model_type,
            **more,
        )
    )
    nn.quantize(model.language_model, 64, 4)
    mx.eval(model.parameters())
    return MlxVlmTarget(model, FAMILIES[model_type])


def make_drafter(target: MlxVlmTarget) -> FlashDrafter:
    mx.random.seed(3)
    config = FlashConfig(
        hidden_size=SIZE,
        vocab_size=VOCAB_SIZE,
        num_heads=2,
        head_dim=64,
        intermediate_size=256,
        block_size=3,
        num_latents=4,
    )
    return FlashDrafter(FlashModel(config), target.embed, target.lm_head)


@dataclass(frozen=True)
class Bushy:
    """Drafts the target's own three best guesses after the newest row, and a guess after each."""

    target: MlxVlmTarget

    def prefill(self, prompt: Prompt, hidden: mx.array, root: int) -> mx.array:
        return hidden[-1:]

    def draft(self, root: int, state: mx.array, sampler: Sampler, key: mx.array) -> DraftTree:
        best, _ = self.target.lm_head.best_tokens(state, 6)
        tokens = mx.concatenate([mx.array([root], mx.int32), best[0]])
        return DraftTree(BUSHY, tokens)

    def extend(self, hidden: mx.array, tokens: tuple[int, ...], state: mx.array) -> mx.array:
        return hidden[-1:]


def generate(target: MlxVlmTarget, drafter: Any, temperature: float = 0) -> Sequence[int]:
    rounds = decode(
        target,
        drafter,
        PROMPT,
        sampler=Sampler(temperature),
        key=mx.random.key(5),
        max_tokens=MAX_TOKENS,
        stop_ids=(),
    )
    return [token for one in rounds for token in one.tokens]


@pytest.fixture(params=["llava", "qwen2_5_vl"])
def target(request: pytest.FixtureRequest) -> MlxVlmTarget:
    return make_target(request.param)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("make", [make_drafter, Bushy])
def test_a_text_is_the_same_with_every_kernel(
    target: MlxVlmTarget,
    make: Any,
    temperature: float,
    forced: Emulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    emulator = Emulator(QUICK)  # the kernels' own tests try more schedules
    monkeypatch.setattr(mx.fast, "metal_kernel", emulator.metal_kernel)
    monkeypatch.setenv("FLASH_MLX_KERNELS", "off")
    expected = generate(target, make(target), temperature)
    assert emulator.launches == []
    monkeypatch.setenv("FLASH_MLX_KERNELS", "force")
    use_few_rows(target.model.language_model)
    assert generate(target, make(target), temperature) == expected
    used = {launched.kernel.name for launched in emulator.launches}
    wanted = {"flash_verify_qmm", "flash_accept_tree"}
    if make is Bushy:
        wanted |= {"flash_tree_attention", "flash_tree_join"}
    else:
        wanted |= {"flash_latent_scores", "flash_latent_pool", "flash_slot_attention"}
    if make is Bushy or temperature == 0:
        wanted |= {"flash_lmhead_tiles", "flash_lmhead_join"}
    assert used == wanted


def test_layers_change_their_class_only_on_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    target = make_target("llava")
    if not metal.available():
        use_few_rows(target.model.language_model)
        classes = {type(module) for module in target.model.language_model.modules()}
        assert FewRowsLinear not in classes
    monkeypatch.setattr(metal, "available", lambda: True)
    use_few_rows(target.model.language_model)
    layers = [m for m in target.model.language_model.modules() if isinstance(m, FewRowsLinear)]
    assert len(layers) == 2 * 7  # not the LM head


def test_shapes_outside_the_guard_fall_back(
    forced: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = nn.Linear(96, 40)  # 96 columns are no multiple of 128
    layer = nn.QuantizedLinear.from_linear(plain, 32, 4)
    x = mx.random.normal((1, 5, 96))
    expected = layer(x)
    layer.__class__ = FewRowsLinear
    assert mx.array_equal(layer(x), expected)
    assert mx.array_equal(layer(x[:, :1]), nn.QuantizedLinear.__call__(layer, x[:, :1]))
    logits = mx.random.normal((2, 50))
    assert mx.array_equal(most_likely(logits, 1)[0][:, 0], mx.argmax(logits, axis=-1))
    assert forced.launches == []
    assert dispatch.mode() == "force"


def test_gradients_pass_the_lm_head(target: MlxVlmTarget, forced: Emulator) -> None:
    """A drafter is trained through the target's LM head, and kernels have no gradients."""
    use_few_rows(target.model.language_model)
    hidden = mx.random.normal((5, SIZE), key=mx.random.key(0))
    gradient = mx.grad(lambda x: target.lm_head(x).sum())(hidden)
    packed = target.lm_head.packed
    assert packed is not None
    weight = mx.dequantize(*packed[:3], group_size=packed[3], bits=packed[4])
    assert mx.allclose(gradient, mx.broadcast_to(weight.sum(axis=0), (5, SIZE)), atol=1e-4)
    assert mx.allclose(target._verified(hidden), target.lm_head(hidden), atol=1e-4)
    assert forced.launches
