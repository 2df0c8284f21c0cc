"""Published drafters: recognised, mapped strictly, and working on their target afterwards."""

import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from commands import command
from flash_mlx.checkpoint import load_network, save_drafter
from flash_mlx.convert import convert_drafter, is_drafter
from flash_mlx.draft import FlashConfig
from flash_mlx.draft.adaptive import unpaced
from flash_mlx.draft.kinds import KINDS
from flash_mlx.few_rows import join_layers
from flash_mlx.files import read_header
from flash_mlx.generate import generate, load
from flash_mlx.loading import with_drafter
from flash_mlx.targets.weights import num_bytes
from flash_reference import random_model as random_flash
from published import publish, table_of
from tiny import build_llava, random_image


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_drafter_is_the_same_network_and_drafts_for_its_target(
    tiny_qwen: Path, tmp_path: Path, kind: str
) -> None:
    table = None if kind == "eagle3" else table_of(tiny_qwen)
    source = publish(tmp_path / "published", kind, table)
    assert is_drafter(source)
    done = convert_drafter(source, tmp_path / "ours", name="org/name", target=tiny_qwen)
    assert done.kind == kind
    assert ("dropped" if table is not None else "brings no embedding") in " ".join(done.remarks)
    header = read_header(tmp_path / "ours" / "model.safetensors")
    assert not any("embed_tokens" in name or "rotary" in name or name == "t2d" for name in header)
    network, notes = load_network(tmp_path / "ours")
    assert notes["target"]["model_type"] == "qwen2_5_vl"
    assert notes["target"]["rope_base"] == (1000000.0)
    assert len(notes["target"]["sha256"]) == len(notes["source"]["sha256"]) == 64
    published = mx.load(str(source / "model.safetensors"))
    for name, value in tree_flatten(network.parameters()):
        np.testing.assert_array_equal(np.array(value), np.array(published[name]))
    plain = load(tiny_qwen, "none")
    drafted = with_drafter(plain, tmp_path / "ours")
    assert drafted.draft_kind == kind
    settings: dict[str, Any] = {"image": random_image(), "max_tokens": 6, "temperature": 0.0}
    assert (
        generate(drafted, "What?", **settings).token_ids
        == generate(plain, "What?", **settings).token_ids
    )


def test_an_embedding_of_its_own_is_kept(tiny_qwen: Path, tmp_path: Path) -> None:
    other = table_of(tiny_qwen) + 1
    source = publish(tmp_path / "published", "eagle", other)
    done = convert_drafter(source, tmp_path / "a", name="x", target=tiny_qwen)
    assert "kept: it is not that of" in done.remarks[0]
    done = convert_drafter(source, tmp_path / "b", name="x")
    assert "with --target" in done.remarks[0]
    for folder in ("a", "b"):
        network, _ = load_network(tmp_path / folder)
        np.testing.assert_array_equal(np.array(network.embed_tokens.weight), np.array(other))
    drafted = load(tiny_qwen, tmp_path / "b")
    plain = with_drafter(drafted, "none")
    ids = [generate(m, "What?", max_tokens=6, temperature=0).token_ids for m in (plain, drafted)]
    assert ids[0] == ids[1]


def quantized(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, m) for name, m in model.named_modules() if "Quantized" in type(m).__name__]


def test_layers_that_are_joined_stay_quantised_and_say_the_same() -> None:
    layers = [nn.Linear(64, outputs, bias=True) for outputs in (8, 24, 1)]
    packed = [layer.to_quantized(32, 4) for layer in layers]
    x = mx.random.normal((3, 64), key=mx.random.key(1))
    joined = join_layers(*packed)
    assert isinstance(joined, nn.QuantizedLinear)
    expected = mx.concatenate([layer(x) for layer in packed], axis=-1)
    assert mx.allclose(joined(x), expected, atol=1e-6)
    with pytest.raises(ValueError, match="all be quantised, or none"):
        join_layers(layers[0], packed[1])


@pytest.mark.parametrize(
    ("place", "offset", "words"),
    [(99, 301, "number 99 is 400"), (5, -4, "number 5 is 1, after 16"), (0, -1, "number 0 is -1")],
)
def test_offsets_that_lead_out_of_the_targets_tokens_are_refused(
    tmp_path: Path, place: int, offset: int, words: str
) -> None:
    source = publish(tmp_path / "published", "eagle3")
    convert_drafter(source, tmp_path / "good", name="x")
    for folder in (source, tmp_path / "good"):
        file = folder / "model.safetensors"
        weights = dict(mx.load(str(file)))
        weights["d2t"][place] = offset
        mx.eval(weights)
        mx.save_safetensors(str(file), weights)
    with pytest.raises(ValueError, match=words):
        convert_drafter(source, tmp_path / "bad", name="x")
    assert not (tmp_path / "bad").exists()
    with pytest.raises(ValueError, match=words):
        load_network(tmp_path / "good")


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
def test_the_tokens_that_are_proposed_stay_and_their_rows_are_copied_as_they_are(
    tmp_path: Path, tied: bool
) -> None:
    from flash_mlx.convert import convert_target

    config = FlashConfig(64, 400, 3, 2, num_heads=2, head_dim=16, draft_vocab_size=40)
    model, ids = random_flash(config), [*range(0, 390, 10), 399]
    model.draft_ids = mx.array(ids, dtype=mx.int32)
    save_drafter(model, tmp_path / "own", {})
    convert_drafter(tmp_path / "own", tmp_path / "q", name="x", bits=4, group_size=32)
    assert load_network(tmp_path / "q")[0].proposed_ids.tolist() == ids
    source = build_llava(tmp_path / "source", tied=tied)
    target = convert_target(str(source), tmp_path / "target", bits=4, group_size=32)
    drafted = load(target, tmp_path / "q", draft_block_size=2, keep_quantized=True)
    drafter = unpaced(drafted.drafter)
    assert drafter.head_bytes == 40 * (64 // 2 + 64 // 32 * 2 * 4)  # scales and biases of 4 bytes
    assert drafted.drafter_bytes == num_bytes(drafter.model) + drafter.head_bytes
    plain = with_drafter(drafted, "none")
    for temperature in (0.0, 1.0):
        said = [
            generate(m, "What?", image=random_image(), max_tokens=12, temperature=temperature)
            for m in (plain, drafted)
        ]
        assert said[1].stats.drafted > 0
        if not temperature:
            assert said[0].token_ids == said[1].token_ids


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["msd", "flash", "vispec", "eagle3"])
def test_quantised_drafters_draft_for_quantised_targets(
    tiny_llava: Path, tmp_path: Path, kind: str, bits: int
) -> None:
    from flash_mlx.convert import convert_target

    source = publish(tmp_path / "published", kind)
    done = convert_drafter(source, tmp_path / "q", name="x", bits=bits, group_size=32)
    whole = convert_drafter(source, tmp_path / "whole", name="x")
    assert done.size < 0.6 * whole.size
    target = convert_target(str(tiny_llava), tmp_path / "target", bits=bits, group_size=32)
    drafted = load(target, tmp_path / "q", draft_block_size=2, keep_quantized=True)
    packed = [name for name, module in quantized(drafted.target.model)]
    assert len(packed) > 10
    assert not any("vision" in name for name in packed)
    assert quantized(unpaced(drafted.drafter).model)
    plain = with_drafter(drafted, "none")
    settings: dict[str, Any] = {"image": random_image(), "max_tokens": 12, "temperature": 0.0}
    ids = [generate(m, "What?", **settings).token_ids for m in (plain, drafted)]
    assert ids[0] == ids[1]
    assert generate(drafted, "What?", **settings).stats.drafted > 0
    unpacked = load(target, tmp_path / "q")
    if mx.default_device() == mx.Device(mx.cpu):
        assert not quantized(unpacked.target.model)
        assert not quantized(unpaced(unpacked.drafter).model)
        assert unpacked.target_bytes > 1.5 * drafted.target_bytes
        assert unpacked.drafter_bytes > 1.5 * drafted.drafter_bytes
    again = convert_drafter(tmp_path / "whole", tmp_path / "again", name="x", bits=8)
    assert again.kind == kind


def test_eagle_3_is_known_by_either_name_of_its_layer(tmp_path: Path) -> None:
    source = publish(tmp_path / "midlayer", "eagle3")
    other = Path(shutil.copytree(source, tmp_path / "layers"))
    tensors = mx.load(str(source / "model.safetensors"))
    mx.eval(tensors)
    renamed = {name.replace("midlayer.", "layers.0."): value for name, value in tensors.items()}
    assert renamed.keys() != tensors.keys()
    mx.save_safetensors(str(other / "model.safetensors"), renamed)
    networks = []
    for folder in (source, other):
        done = convert_drafter(folder, tmp_path / f"{folder.name}-ours", name="x")
        assert done.kind == "eagle3"
        networks.append(dict(tree_flatten(load_network(done.folder)[0].parameters())))
    assert networks[0].keys() == networks[1].keys()
    assert all(mx.array_equal(value, networks[1][name]) for name, value in networks[0].items())


def test_what_the_tensors_do_not_say(tmp_path: Path) -> None:
    source = publish(tmp_path / "llava", "eagle", architectures=["LlavaLlamaForCausalLM"])
    assert convert_drafter(source, tmp_path / "a", name="x").kind == "msd"
    source = publish(tmp_path / "plain", "eagle", model_type="llava")
    assert convert_drafter(source, tmp_path / "b", name="x").kind == "eagle"
    assert convert_drafter(source, tmp_path / "c", name="x", kind="msd").kind == "msd"


@pytest.mark.parametrize(
    ("tensors", "settings", "words"),
    [
        ({"fc.bias": mx.ones(3)}, {}, r"fc.bias must have the shape \(64,\)"),
        ({"layers.0.mlp.up_proj.weight": None}, {}, "must hold layers.0.mlp.up_proj.weight"),
        ({"fc_norm.weight": mx.ones(64)}, {}, "has fc_norm.weight as well"),
        ({"fc.weight": mx.full((64, 128), mx.nan)}, {}, "fc.weight must be finite"),
        ({}, {"num_attention_heads": 7}, "num_attention_heads .* it has 7"),
        ({}, {"rope_scaling": {"type": "linear", "factor": 2}}, "'linear'"),
        ({}, {"num_attention_heads": 64}, "head_dim|num_kv_heads|even"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(
    tmp_path: Path, tensors: dict[str, Any], settings: dict[str, Any], words: str
) -> None:
    source = publish(tmp_path / "published", "eagle", **settings)
    file = source / "model.safetensors"
    stored = dict(mx.load(str(file))) | tensors
    mx.eval([value for value in stored.values() if value is not None])
    mx.save_safetensors(str(file), {k: v for k, v in stored.items() if v is not None})
    with pytest.raises(ValueError, match=words):
        convert_drafter(source, tmp_path / "ours", name="x")
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_drafters_and_targets_of_other_sizes_are_both_named(
    tiny_llava: Path, tiny_qwen: Path, tmp_path: Path
) -> None:
    source = publish(tmp_path / "published", "eagle", mx.zeros((500, 64)))
    with pytest.raises(ValueError, match=r"vocabulary of 500, .* has 64 and 400"):
        convert_drafter(source, tmp_path / "a", name="x", target=tiny_llava)
    convert_drafter(source, tmp_path / "b", name="x")
    with pytest.raises(ValueError, match=r"vocabulary of 500, this target's is 400"):
        load(tiny_llava, tmp_path / "b")
    other = publish(tmp_path / "other", "eagle")
    convert_drafter(other, tmp_path / "c", name="x", target=tiny_qwen)
    with pytest.raises(ValueError, match=r"model type 'qwen2_5_vl', this target's is 'llava'"):
        load(tiny_llava, tmp_path / "c")
    note = json.loads((tmp_path / "c" / "config.json").read_text())
    for name, value, words in (
        ("rope_base", 5e6, r"RoPE base 5000000.0, this target's is 1000000.0"),
        ("num_layers", 28, r"decoder layers 28, this target's is 4"),
    ):
        changed = note | {"target": note["target"] | {name: value}}
        (tmp_path / "c" / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=words):
            load(tiny_qwen, tmp_path / "c")
    features = publish(tmp_path / "features", "eagle3")
    convert_drafter(features, tmp_path / "d", name="x")
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    (tmp_path / "d" / "config.json").write_text(json.dumps(config | {"feature_high": 29}))
    with pytest.raises(ValueError, match="layers 2, 2, 29, the target has 4"):
        load(tiny_qwen, tmp_path / "d")


class Hostile:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.witness)!r}, 'w')",)


@pytest.mark.parametrize("form", ["pickle", "zip"])
def test_a_hostile_torch_file_does_not_run(tmp_path: Path, form: str) -> None:
    source, witness = tmp_path / "published", tmp_path / "ran"
    source.mkdir()
    if form == "zip":
        torch = pytest.importorskip("torch")
        torch.save({"fc.weight": Hostile(witness)}, source / "pytorch_model.bin")
    else:
        (source / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile(witness)))
    (source / "config.json").write_text("{}")
    code, _, err = command("convert", "--hf-path", source, "--mlx-path", tmp_path / "ours")
    assert code == 1
    assert ("nothing in it was run" in err) or ("flash-mlx[torch]" in err)
    assert len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["published"]
    with pytest.MonkeyPatch.context() as patch:  # the file is one that would have run
        patch.chdir(tmp_path)
        if form == "pickle":
            pickle.loads((source / "pytorch_model.bin").read_bytes())
            assert witness.exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_torch_files_are_read(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    source = publish(tmp_path / "published", "vispec")
    tensors = mx.load(str(source / "model.safetensors"))
    state = {k: torch.tensor(np.array(v)).to(getattr(torch, dtype)) for k, v in tensors.items()}
    torch.save(state, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    done = convert_drafter(source, tmp_path / "ours", name="x")
    assert done.kind == "vispec"
    stored = mx.load(str(tmp_path / "ours" / "model.safetensors"))
    assert stored["fc.weight"].dtype == getattr(mx, dtype)
    for name, value in stored.items():
        assert mx.array_equal(value, tensors[name].astype(value.dtype))
    (source / "pytorch_model.bin").write_bytes((source / "pytorch_model.bin").read_bytes()[:5000])
    with pytest.raises(ValueError, match="must be a whole torch file"):
        convert_drafter(source, tmp_path / "cut", name="x")


def test_without_torch_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"pip install 'flash-mlx\[torch\]'"):
        is_drafter(tmp_path)


def test_the_command_says_what_it_found(tiny_llava: Path, tmp_path: Path) -> None:
    source = publish(tmp_path / "published", "vispec", table_of(tiny_llava))
    words = ["convert", "--hf-path", source, "--mlx-path", tmp_path / "ours"]
    code, out, err = command(*words, "--target", tiny_llava, "-q", "--q-group-size", "32")
    assert (code, out) == (0, b""), err
    assert "is a drafter of the kind vispec with 0.1 million parameters" in err
    assert "a copy of the target's" in err
    assert "Wrote" in err
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": 4}
    code, _, err = command(*words)
    assert code == 1
    assert "must be new or empty" in err
    shutil.rmtree(tmp_path / "ours")
    code, _, err = command(*words, "--upload-repo", "org/name")
    assert code == 2
    assert "is a drafter" in err
