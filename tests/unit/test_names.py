"""Real checkpoints' tensor names and shapes onto the loaded model, without a weight.

The indexes are those of published checkpoints; the arrays are lazy zeros of the shapes that follow
from `config.json` (`hub_shapes`), and are never computed. Skipped without the shared test data.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from flash_mlx.targets import MlxVlmTarget, load_target
from flash_mlx.targets.families import family_of
from hub_shapes import packed, shape_of
from tiny import edit_json

CONFIGS = Path(__file__).resolve().parents[3] / "shared" / "data" / "configs"
INDEX = "model.safetensors.index.json"
# Folder, tensors of the index, and those that the model has besides: Gemma's LM head is a copy of
# its embedding.
CHECKPOINTS = (
    ("llava-1.5-7b-hf", 686, 0),
    ("qwen2-vl-7b-olmocr", 730, 0),
    ("qwen2.5-vl-3b", 824, 0),
    ("qwen2.5-vl-7b", 729, 0),
    ("qwen3-vl-cosmos-reason2", 750, 0),
    ("gemma3-medgemma-27b", 1247, 1),
    ("qwen3.5-mlx-quantized", 2180, 0),
)

pytestmark = pytest.mark.skipif(not CONFIGS.is_dir(), reason="needs the shared test data")


class Published:
    """A checkpoint of which only the configuration and the index are here."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(CONFIGS / name, folder)
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.index = json.loads((folder / INDEX).read_text())
        self.tensors = {tensor: self.shape(tensor) for tensor in self.index["weight_map"]}
        for shard in set(self.index["weight_map"].values()):
            (folder / shard).touch()
            self.any_shard = shard

    def shape(self, tensor: str) -> tuple[tuple[int, ...], int]:
        """The shape of a tensor, and the bytes of an item."""
        module, _, part = tensor.rpartition(".")
        if f"{module}.scales" not in self.index["weight_map"]:
            return shape_of(tensor, self.config), 2
        settings = self.config["quantization"]
        return packed(
            shape_of(f"{module}.weight", self.config), part, settings.get(module, settings)
        )

    def shard(self, file: str) -> dict[str, mx.array]:
        """What a shard holds: lazy zeros."""
        return {
            tensor: mx.zeros(shape, mx.uint32 if item == 4 else mx.bfloat16)
            for tensor, (shape, item) in self.tensors.items()
            if self.index["weight_map"][tensor] == Path(file).name
        }


@pytest.fixture
def published(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Published:
    checkpoint = Published(request.param, tmp_path / "checkpoint")
    monkeypatch.setattr("mlx_vlm.utils._load_safetensors", checkpoint.shard)
    return checkpoint


@pytest.mark.parametrize(
    ("published", "tensors", "more"), CHECKPOINTS, indirect=["published"], ids=lambda x: str(x)
)
def test_every_published_tensor_has_its_place(
    published: Published, tensors: int, more: int
) -> None:
    from mlx_vlm.utils import load_model

    assert len(published.tensors) == tensors
    if stated := published.index["metadata"]["total_size"]:  # the shapes are right
        assert sum(math.prod(shape) * item for shape, item in published.tensors.values()) == stated
    mx.reset_peak_memory()
    model = load_model(published.folder, lazy=True, strict=True)
    parameters = dict(tree_flatten(model.parameters()))
    assert len(parameters) == tensors + more
    assert mx.get_peak_memory() < 100_000_000  # nothing was computed
    if published.config["model_type"] == "qwen3_5":
        return
    target = MlxVlmTarget(model, family_of(published.config["model_type"]))
    text = published.config.get("text_config", published.config)
    assert target.hidden_size == text.get("hidden_size", 4096)
    assert target.vocab_size == text["vocab_size"]


@pytest.mark.parametrize("published", ["qwen2.5-vl-7b"], indirect=True)
@pytest.mark.parametrize("change", ["missing", "leftover", "shape"])
def test_one_tensor_more_or_less_is_noticed(published: Published, change: str) -> None:
    from mlx_vlm.utils import load_model

    if change == "missing":
        del published.tensors["visual.blocks.7.attn.qkv.bias"]
    elif change == "leftover":
        published.tensors["model.layers.3.odd.weight"] = ((2, 2), 2)
        published.index["weight_map"]["model.layers.3.odd.weight"] = published.any_shard
    else:
        published.tensors["model.layers.3.mlp.up_proj.weight"] = ((18944, 3583), 2)
    with pytest.raises(ValueError, match=r"qkv|odd|up_proj"):
        load_model(published.folder, lazy=True, strict=True)


@pytest.mark.parametrize("published", ["qwen3-vl-embedding"], indirect=True)
def test_a_model_without_an_lm_head_is_no_target(published: Published) -> None:
    from mlx_vlm.utils import load_model

    with pytest.raises(ValueError, match="lm_head"):
        load_model(published.folder, lazy=True, strict=True)


@pytest.mark.parametrize("said", [True, False], ids=["by-the-configuration", "by-the-names"])
def test_weights_that_bitsandbytes_packed_are_refused(tmp_path: Path, said: bool) -> None:
    folder = tmp_path / "nf4"
    shutil.copytree(CONFIGS / "llava-next-video-nf4", folder)
    if not said:
        edit_json(folder, "config.json", quantization_config=None)
    with pytest.raises(ValueError, match=r"packed by bitsandbytes .* original checkpoint"):
        load_target(folder)
