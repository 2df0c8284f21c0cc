"""From a folder to a target: what loads, in which type, and what is refused before it can harm."""

import json
import shutil
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from flash_mlx.few_rows import lay_out_for_few_rows
from flash_mlx.processing import make_prompt
from flash_mlx.targets import LoadedTarget, load_target
from flash_mlx.tree import DraftTree, Topology
from tiny import build_llava, build_qwen, edit_json, random_image

on_a_cpu = pytest.mark.skipif(
    mx.default_device() != mx.Device(mx.cpu), reason="checks what happens on a CPU"
)


@pytest.fixture
def llava_copy(tiny_llava: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llava, tmp_path / "llava"))


@pytest.fixture
def qwen_copy(tiny_qwen: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_qwen, tmp_path / "qwen"))


def types(model: nn.Module) -> set[mx.Dtype]:
    return {value.dtype for _, value in tree_flatten(model.parameters())}


def prefill_logits(loaded: LoadedTarget) -> mx.array:
    prompt = make_prompt(loaded, "What is this?", [random_image()])
    return loaded.target.prefill(prompt, loaded.target.make_cache()).logits


def quantize_checkpoint(folder: Path, bits: int = 4) -> None:
    """Quantise a checkpoint's language model as mlx-vlm's converter would."""
    from mlx_vlm import load

    model, _ = load(str(folder))
    nn.quantize(model.language_model, group_size=32, bits=bits)
    model.set_dtype(mx.bfloat16)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    edit_json(folder, "config.json", quantization={"group_size": 32, "bits": bits})


def test_a_loaded_target_brings_what_its_checkpoint_says(
    llava: LoadedTarget, qwen: LoadedTarget
) -> None:
    assert llava.model_type == "llava"
    assert qwen.model_type == "qwen2_5_vl"
    for loaded in (llava, qwen):
        tokenizer = loaded.processor.tokenizer
        assert loaded.eos_ids == tuple(tokenizer.stopping_criteria.eos_token_ids)
        assert loaded.target.vocab_size == len(tokenizer)
        assert loaded.target.hidden_size == 64
        assert tokenizer.decode([loaded.image_token_id]) == loaded.processor.image_token
    assert len(qwen.eos_ids) == 2
    assert qwen.generation_defaults["repetition_penalty"] == 1.05


def test_loading_and_prompting_is_silent_and_needs_no_network(
    tiny_llava: Path,
    tiny_qwen: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    attempts: list[object] = []

    def refuse(*args: object, **_: object) -> None:
        attempts.append(args)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # as users have it
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for folder in (tiny_llava, tiny_qwen):
        assert prefill_logits(load_target(folder)).shape[0] == 1
        assert prefill_logits(load_target(str(folder))).shape[0] == 1
    assert not attempts
    assert capfd.readouterr() == ("", "")
    with suppress(Exception):
        huggingface_hub.model_info("nobody/nothing", timeout=1)
    assert attempts, "the trap does not work"


@pytest.mark.parametrize(
    "build",
    [
        lambda folder: build_llava(folder, tied=True),
        lambda folder: build_llava(folder, vision_feature_layer=-1),
        lambda folder: build_llava(folder, strategy="full"),
        lambda folder: build_llava(folder, image_size=128, patch_size=8),
        lambda folder: build_qwen(folder, tied=True),
    ],
    ids=["tied", "last-layer", "with-cls", "256-rows", "qwen-tied"],
)
def test_variants_of_a_family_load(build: Callable[[Path], Path], tmp_path: Path) -> None:
    loaded = load_target(build(tmp_path / "variant"))
    assert loaded.target.supports_tree
    prompt = make_prompt(loaded, "What is this?", [random_image(), random_image(seed=2)])
    model, cache = loaded.target.model, loaded.target.make_cache()
    ids = mx.array(prompt.tokens)[None]
    merged = model.get_input_embeddings(ids, **prompt.inputs).inputs_embeds[0]
    changed = mx.any(merged != loaded.target.embed(ids[0]), axis=-1).tolist()
    assert sum(changed) == prompt.num_visual_tokens
    out = loaded.target.prefill(prompt, cache)
    assert mx.array_equal(loaded.target.lm_head(out.hidden[-1:]), out.logits)
    if "vision_config" in loaded.config and loaded.config["vision_config"].get("patch_size") == 8:
        assert prompt.num_visual_tokens == 512


@on_a_cpu
@pytest.mark.parametrize("family", ["llava_copy", "qwen_copy"])
def test_on_a_cpu_quantised_and_16_bit_weights_become_float32(
    family: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(family)
    expected = prefill_logits(load_target(folder))
    quantize_checkpoint(folder, bits=8)
    loaded = load_target(folder)
    assert types(loaded.target.model) == {mx.float32}
    assert not any("Quantized" in type(m).__name__ for m in loaded.target.model.modules())
    packed = load_target(folder, dtype=mx.float32)
    assert any("Quantized" in type(m).__name__ for m in packed.target.model.modules())
    difference = mx.abs(prefill_logits(loaded) - prefill_logits(packed)).max()
    assert float(difference) < 1e-3
    share = mx.abs(prefill_logits(loaded) - expected).max() / mx.abs(expected).max()
    assert float(share) < 0.2


@on_a_cpu
@pytest.mark.parametrize("build", [build_llava, build_qwen])
def test_a_dtype_is_kept_if_asked_for(build: Callable[..., Path], tmp_path: Path) -> None:
    folder = build(tmp_path / "bf16", dtype=mx.bfloat16)
    assert types(load_target(folder).target.model) == {mx.float32}
    loaded = load_target(folder, dtype=mx.bfloat16)
    assert types(loaded.target.model) == {mx.bfloat16}
    assert loaded.target.supports_tree
    assert prefill_logits(loaded).dtype == mx.bfloat16
    tree = DraftTree(Topology((-1, 0, 0)), mx.array([1, 2, 3]))
    cache = loaded.target.make_cache()
    loaded.target.prefill(make_prompt(loaded, "What?"), cache)
    assert loaded.target.verify(tree, cache).logits.dtype == mx.bfloat16


def test_the_layout_of_weights_changes_no_value() -> None:
    for shape in ((24, 8), (8, 24), (8, 8)):
        layer = nn.Linear(shape[1], shape[0])
        x, weight = mx.random.normal((3, shape[1])), mx.array(layer.weight)
        expected = layer(x)
        lay_out_for_few_rows(layer)
        assert mx.array_equal(layer.weight, weight)
        assert mx.allclose(layer(x), expected, atol=1e-6)


def test_quantisation_that_is_not_mlxs_own_is_refused_on_a_cpu() -> None:
    from flash_mlx.targets.weights import dequantize

    layer = nn.Module()
    layer.scales = mx.ones(3)
    model = nn.Module()
    model.odd = layer
    with pytest.raises(ValueError, match="odd is a Module"):
        dequantize(model)


def test_a_processor_saved_without_patch_size_is_completed(
    llava_copy: Path, llava: LoadedTarget
) -> None:
    (llava_copy / "processor_config.json").unlink()
    loaded = load_target(llava_copy)
    ask = "What is this?", [random_image()]
    assert make_prompt(loaded, *ask).tokens == make_prompt(llava, *ask).tokens


def test_code_in_a_checkpoint_is_never_executed(llava_copy: Path, tmp_path: Path) -> None:
    witness = tmp_path / "executed"
    code = f"from pathlib import Path\nPath({str(witness)!r}).touch()\n"
    for name in ("evil.py", "processing_evil.py", "configuration_evil.py"):
        (llava_copy / name).write_text(code)
    auto = {"AutoTokenizer": ["evil.Evil", None], "AutoProcessor": "processing_evil.Evil"}
    edit_json(llava_copy, "tokenizer_config.json", auto_map=auto)
    edit_json(llava_copy, "processor_config.json", auto_map=auto)
    edit_json(llava_copy, "preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.Evil"})
    edit_json(
        llava_copy,
        "config.json",
        auto_map={"AutoConfig": "configuration_evil.Evil", "AutoModel": "evil.Evil"},
    )
    with suppress(ValueError):  # transformers may refuse such a checkpoint, or do without the code
        load_target(llava_copy)
    assert not witness.exists()

    edit_json(llava_copy, "config.json", model_file="evil.py")
    with pytest.raises(ValueError, match=r"'evil\.py' as model_file"):
        load_target(llava_copy)
    assert not witness.exists()


def test_a_missing_folder_file_or_configuration_is_said(tiny_llava: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_target(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match="is a file"):
        load_target(tiny_llava / "config.json")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_target(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tokenizer.json", "must bring its tokenizer"),
        ("model.safetensors", "has none. Convert it first"),
    ],
)
def test_a_missing_part_is_named(llava_copy: Path, name: str, message: str) -> None:
    (llava_copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        load_target(llava_copy)


def test_a_missing_image_processor_is_named(llava_copy: Path) -> None:
    (llava_copy / "preprocessor_config.json").unlink()
    (llava_copy / "processor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="must bring its image processor"):
        load_target(llava_copy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be valid JSON"),
        ("[]", "it holds a list"),
        ('{"model_type": "qwen9"}', r"one of .*llava, .*qwen2_5_vl, .*; config\.json says 'qwen9'"),
        ("{}", "config.json says None"),
        ('{"model_type": ["llava"]}', "must be one of"),
        ('{"model_type": "qwen3_5"}', "qwen3_5 has recurrent layers"),
        ('{"model_type": "gemma4"}', "gemma4 lets the rows of an image see one another"),
        ("\udcff".encode("utf-8", "surrogateescape"), "must be valid JSON"),
        ("[" * 100_000, "must be valid JSON"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(
    llava_copy: Path, content: str | bytes, message: str
) -> None:
    raw = content if isinstance(content, bytes) else content.encode()
    (llava_copy / "config.json").write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        load_target(llava_copy)


@pytest.mark.parametrize("kept", [0, 5, 8, 100, 3000, -1])
def test_truncated_weights_are_refused(llava_copy: Path, kept: int) -> None:
    file = llava_copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors must be a whole safetensors file"):
        load_target(llava_copy)


@pytest.mark.parametrize(
    "content",
    [
        b"<!DOCTYPE html><html>not found</html>",
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 9) + b'{"a": 17}',
        struct.pack("<Q", 3) + b"\xff\xfe\xfd",
    ],
)
def test_files_that_only_look_like_weights_are_refused(llava_copy: Path, content: bytes) -> None:
    (llava_copy / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        load_target(llava_copy)


def test_sharded_weights_load(llava_copy: Path, llava: LoadedTarget) -> None:
    shard_weights(llava_copy)
    assert mx.array_equal(prefill_logits(load_target(llava_copy)), prefill_logits(llava))


def test_a_missing_shard_is_named(llava_copy: Path) -> None:
    shard_weights(llava_copy)
    (llava_copy / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names model-2\.safetensors, which is missing"):
        load_target(llava_copy)


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "model.bin",
        "..\\m.safetensors",
    ],
)
def test_an_index_that_leaves_the_folder_is_refused(llava_copy: Path, name: str) -> None:
    index = llava_copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(ValueError, match=r"must name \.safetensors files beside it"):
        load_target(llava_copy)


def test_an_empty_index_is_refused(llava_copy: Path) -> None:
    (llava_copy / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="its weight_map is empty"):
        load_target(llava_copy)


def test_weights_that_do_not_fit_end_in_one_line(llava_copy: Path) -> None:
    weights = mx.load(str(llava_copy / "model.safetensors"))
    assert isinstance(weights, dict)
    mx.eval(weights)
    for wrong in (
        {name: value for name, value in weights.items() if "layers.1." not in name},
        {**weights, "language_model.extra.weight": mx.zeros(3)},
        {name.replace("vision_tower", "model.visual"): v for name, v in weights.items()},
        {**weights, "language_model.lm_head.weight": mx.zeros((3, 3))},
    ):
        mx.save_safetensors(str(llava_copy / "model.safetensors"), wrong)
        with pytest.raises(ValueError, match="must be a checkpoint that mlx-vlm can load") as info:
            load_target(llava_copy)
        assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weight: weight * mx.nan, "finite numbers; NaN or infinity is in 1 of them"),
        (lambda weight: weight / 0, "finite numbers"),
        (lambda weight: weight.astype(mx.int32), r"floating-point numbers; .* is mlx.core.int32"),
    ],
)
@pytest.mark.parametrize("part", ["vision_tower.vision_model.encoder", "language_model.model"])
def test_weights_that_are_no_numbers_are_named(
    llava_copy: Path, part: str, change: Callable[[mx.array], mx.array], message: str
) -> None:
    file = str(llava_copy / "model.safetensors")
    weights = mx.load(file)
    assert isinstance(weights, dict)
    name = f"{part}.layers.1.{'self_attn.q_proj' if 'vision' in part else 'mlp.up_proj'}.weight"
    mx.eval(weights)
    mx.save_safetensors(file, weights | {name: change(weights[name])})
    with pytest.raises(ValueError, match=message) as info:
        load_target(llava_copy)
    assert name in str(info.value)


def test_weights_packed_by_bitsandbytes_are_refused_by_their_configuration(
    llava_copy: Path,
) -> None:
    packing = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    edit_json(llava_copy, "config.json", quantization_config=packing)
    with pytest.raises(ValueError, match=r"packed by bitsandbytes \(nf4\)"):
        load_target(llava_copy)


@pytest.mark.parametrize(
    "changes",
    [{"image_token_index": "x"}, {"vision_config": "x"}, {"text_config": []}, {"quantization": 1}],
)
def test_settings_of_the_wrong_type_end_in_one_line(
    llava_copy: Path, changes: dict[str, object]
) -> None:
    edit_json(llava_copy, "config.json", **changes)
    with pytest.raises(ValueError, match="must be a checkpoint that mlx-vlm can load") as info:
        load_target(llava_copy)
    assert "\n" not in str(info.value)


def shard_weights(folder: Path) -> None:
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    names = sorted(weights)
    weight_map = {}
    for number, part in ((1, names[::2]), (2, names[1::2])):
        file = f"model-{number}.safetensors"
        mx.save_safetensors(str(folder / file), {name: weights[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
