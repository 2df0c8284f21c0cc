import json
from dataclasses import replace

import huggingface_hub
import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from flash_mlx.checkpoint import (
    TargetFacts,
    load_drafter,
    load_model,
    read_config,
    resolve_path,
    save_drafter,
)
from flash_mlx.files import read_header, replacing
from flash_reference import SMALL, random_model
from toy import ToyTarget

TARGET = ToyTarget()
FULL = replace(SMALL, norm_inputs=True, markov_rank=3, hydra_size=4)


@pytest.fixture
def folder(tmp_path):
    save_drafter(random_model(FULL), tmp_path / "drafter", {"target": {"model_type": "toy"}})
    return tmp_path / "drafter"


def edit(file, **changes):
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def rewrite(file, **changes):
    """Change tensors of a safetensors file; None removes one."""
    weights = dict(mx.load(str(file))) | {k.replace("__", "."): v for k, v in changes.items()}
    mx.eval(list(filter(lambda v: v is not None, weights.values())))
    mx.save_safetensors(str(file), {k: v for k, v in weights.items() if v is not None})


def test_a_drafter_of_another_family_is_refused(folder):
    with pytest.raises(ValueError, match="is for the model type 'toy', this target's is 'llava'"):
        load_drafter(folder, TARGET, facts=TargetFacts("llava"))
    load_drafter(folder, TARGET, facts=TargetFacts("toy"))
    for nothing in (None, "toy", {}, {"name": "demo"}):
        edit(folder / "config.json", target=nothing)
        load_drafter(folder, TARGET, facts=TargetFacts("llava"))


def test_a_saved_drafter_comes_back_bit_for_bit(folder):
    model, loaded = random_model(FULL), load_model(folder)
    assert loaded.config == FULL
    before, after = (dict(tree_flatten(m.parameters())) for m in (model, loaded))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]) for name in before)


def test_config_json_tells_kind_settings_and_target(folder):
    content = json.loads((folder / "config.json").read_text())
    assert content == {"draft_kind": "flash", "target": {"model_type": "toy"}, **FULL.to_dict()}
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_16_bit_weights_are_computed_in_the_targets_dtype(tmp_path, dtype):
    model = random_model(FULL)
    save_drafter(model, tmp_path, {}, dtype)
    drafter = load_drafter(tmp_path, TARGET, block_size=2)
    assert drafter.block_size == 2
    for name, value in tree_flatten(drafter.model.parameters()):
        stored = dict(tree_flatten(model.parameters()))[name].astype(dtype)
        assert value.dtype == mx.float32
        assert mx.array_equal(value, stored.astype(mx.float32))


def test_a_drafter_is_replaced_as_a_whole(folder):
    save_drafter(random_model(SMALL, seed=5), folder, {})
    assert read_config(folder) == SMALL
    assert load_model(folder).config == SMALL
    assert len(list(folder.iterdir())) == 2


def test_who_reads_a_file_while_it_is_replaced_sees_the_old_one(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("old")
    with file.open() as reader:
        with replacing(file) as new:
            new.write_text("new")
        assert reader.read() == "old"
    assert file.read_text() == "new"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("old")

    def write_half():
        with replacing(file) as new:
            new.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"draft_kind": None}, '"draft_kind": "flash" or .*; it says null.*not a target'),
        ({"draft_kind": "medusa"}, 'it says "medusa"'),
        ({"num_layers": 3}, "config.json: .*num_layers as well"),
        ({"num_latents": -1}, "num_latents .* at least 0; got -1"),
        ({"block_size": 10**12}, "block_size .* below 2.*31, .*; got 1000000000000"),
        ({"vocab_size": 2**31}, "vocab_size .* below 2.*31, .*; got 2147483648"),
        ({"vocab_size": 10**9}, r"vocab_size \* hidden_size .*below .*; got 1000000000 \* 16"),
        ({"intermediate_size": 0, "hidden_size": 2**30}, "intermediate_size .* got 4294967296"),
        ({"hidden_size": None}, "must hold hidden_size"),
        ({"hidden_size": 32, "intermediate_size": 20}, "hidden size of 32, this target's is 16"),
        ({"vocab_size": 12}, "vocabulary of 12, this target's is 11"),
        ({"num_latents": 3}, r"A must have the shape \(3, 16\).*\(2, 16\)"),
        ({"norm_inputs": False}, "only weights .* norm_embedding.weight, norm_hidden.weight"),
        ({"block_size": 4}, r"must hold all weights .* hydra_projs.2.0.weight"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder, changes, words):
    edit(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=words):
        load_drafter(folder, TARGET)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fc_gate__bias": None}, "fc_gate.bias missing"),
        ({"layers__q_norm": mx.ones(2)}, "has layers.q_norm"),
        ({"A": mx.ones((16, 2))}, r"A must have the shape \(2, 16\).*\(16, 2\)"),
        ({"A": mx.ones((2, 16), mx.int32)}, "F32, F16, BF16; in .* I32"),
        ({"A": mx.full((2, 16), mx.nan)}, "A holds NaN"),
        ({"A": mx.full((2, 16), mx.inf), "fc_up__bias": mx.full(16, mx.nan)}, "A, fc_up.bias hold"),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder, changes, words):
    rewrite(folder / "model.safetensors", **changes)
    with pytest.raises(ValueError, match=words):
        load_drafter(folder, TARGET)


@pytest.mark.parametrize("kept", [0, 5, 100, 2000, -1])
def test_a_truncated_file_is_refused(folder, kept):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        load_drafter(folder, TARGET)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2, 16], "data_offsets": [0, 64]},
        {"dtype": "F32", "shape": [2, 16], "data_offsets": [-128, 0]},
        {"dtype": "F32", "shape": [2, 16], "data_offsets": [10**9, 10**9 + 128]},
        {"dtype": "F32", "shape": 3, "data_offsets": [0, 128]},
        {"dtype": "F32", "shape": [2, 16]},
        7,
    ],
)
def test_a_header_that_lies_is_refused(folder, entry):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length]) | {"A": entry}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        read_header(file)
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        load_drafter(folder, TARGET)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00", "[" * 100_000])
def test_a_damaged_config_is_refused(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json must"):
        load_drafter(folder, TARGET)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}"):
        load_drafter(folder, TARGET)


def test_weights_that_are_not_numbers_are_not_saved(tmp_path):
    model = random_model()
    model.fc_up.bias = model.fc_up.bias * mx.nan
    with pytest.raises(ValueError, match=r"fc_up\.bias must be finite"):
        save_drafter(model, tmp_path / "new", {})
    model.fc_up.bias = mx.full(16, 1e6)
    with pytest.raises(ValueError, match=r"saved as mlx.core.float16"):
        save_drafter(model, tmp_path / "new", {}, mx.float16)
    assert not (tmp_path / "new").exists()


def test_metadata_cannot_pose_as_settings(tmp_path):
    with pytest.raises(ValueError, match="block_size"):
        save_drafter(random_model(), tmp_path, {"block_size": 9})


def test_a_local_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert resolve_path(tmp_path) == tmp_path
    assert resolve_path(str(tmp_path)) == tmp_path


def test_an_id_is_downloaded_without_code(tmp_path, monkeypatch):
    calls = []

    def download(repo_id, revision=None, allow_patterns=()):
        calls.append((repo_id, revision))
        assert "*.py" not in allow_patterns
        assert {"*.json", "*.safetensors"} <= set(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_path("org/some.model-7b", "main") == tmp_path
    assert calls == [("org/some.model-7b", "main")]


@pytest.mark.parametrize(
    "error", [OSError("no route to host\nmore"), ValueError("bad id"), RuntimeError()]
)
def test_a_failed_download_says_what_to_do(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(OSError, match=r"no folder org/name.*pass its folder") as raised:
        resolve_path("org/name", "v2")
    assert "\n" not in str(raised.value)
    assert "v2" in str(raised.value)


@pytest.mark.parametrize("name", ["./missing", "/no/such/place", "a/b/c", "two words", ""])
def test_what_is_no_id_is_not_looked_up(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(OSError, match="no folder"):
        resolve_path(name)


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "x.gguf").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        resolve_path(str(tmp_path / "x.gguf"))


def test_a_type_of_tensors_that_is_not_known_is_named(tmp_path):
    entry = {"A": {"dtype": "F4", "shape": [2, 16], "data_offsets": [0, 16]}}
    header = json.dumps(entry).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(ValueError, match=r"of the types F64, .*; A is of the type F4"):
        read_header(file)
