"""Models by hub id, from a hub on loopback: what is fetched, what is said, and what is kept."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from commands import command
from fake_hub import Hub, commit, serving
from flash_mlx.hub import NoRoomError, _require_room
from tiny import build_llava

Ask = Callable[..., tuple[int, str, str]]
NAME = "org/tiny-llava"


@pytest.fixture
def hub(tiny_llava: Path, tmp_path: Path) -> Iterator[Hub]:
    other = build_llava(tmp_path / "other", seed=5)
    main = shutil.copytree(tiny_llava, tmp_path / "main")
    with (main / "notes.txt").open("wb") as notes:
        notes.truncate(25_000_000)  # downloads are written, and go on, in pieces of 10 MB
    with serving({NAME: {"main": main, "v2": other}, "org/gated": {"main": other}}) as hub:
        hub.gated.add("org/gated")
        yield hub


@pytest.fixture
def ask(hub: Hub, tmp_path: Path) -> Ask:
    """Convert a model of the hub: the command that fetches one and does little else."""

    def ask(name: str, *more: object, **environment: str) -> tuple[int, str, str]:
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache")}
        settings |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"} | environment
        words = ["generate", "--model", name, "--draft-model", "none", "--prompt", "What?"]
        words += ["--max-tokens", "2", "--temperature", "0", "--json", *map(str, more)]
        code, out, err = command(*words, environment=settings)
        return code, out.decode(), err

    return ask


def files_fetched(hub: Hub) -> list[str]:
    return [path for method, path, _ in hub.asked if method == "GET" and "/resolve/" in path]


@pytest.mark.slow
def test_a_plan_fetches_the_configuration_alone(hub: Hub, tmp_path: Path) -> None:
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache")}
    settings |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    code, out, err = command("train", "--plan", "--model", NAME, environment=settings)
    assert code == 0, err
    assert b"total" in out
    assert {Path(path).name for path in files_fetched(hub)} == {"config.json"}


@pytest.mark.slow
def test_an_id_is_fetched_once_goes_on_where_it_was_cut_and_then_needs_no_network(
    hub: Hub, ask: Ask
) -> None:
    hub.cut.add("notes.txt")
    code, out, err = ask(NAME)
    assert code == 0, err
    first = json.loads(out)
    assert first["model"] == NAME
    ranges = [r for _, path, r in hub.asked if r and path.endswith("notes.txt")]
    assert len(ranges) == 1
    assert int(ranges[0].removeprefix("bytes=").split("-")[0]) >= 10_000_000
    assert not any(path.endswith(".py") for path in files_fetched(hub))

    hub.asked.clear()
    code, out, _ = ask(NAME, HF_HUB_OFFLINE="1")
    assert (code, hub.asked) == (0, [])
    assert json.loads(out)["token_ids"] == first["token_ids"]
    code, out, _ = ask(NAME, HF_ENDPOINT="http://127.0.0.1:9")  # nobody listens there
    assert code == 0
    assert json.loads(out)["token_ids"] == first["token_ids"]


def test_what_the_hub_does_not_give_is_said_in_one_line(hub: Hub, ask: Ask) -> None:
    for name, part in (("org/missing", "no such model"), ("org/gated", "gated")):
        code, out, err = ask(name)
        assert (code, out) == (1, "")
        assert part in err
        assert "pass its folder" in err
        assert len(err.splitlines()) == 1
    code, _, err = ask(NAME, HF_HUB_OFFLINE="1")
    assert code == 1
    assert "not in the cache" in err
    assert "pass its folder" in err


def test_what_does_not_fit_is_refused_before_it_is_fetched(hub: Hub, ask: Ask) -> None:
    hub.lie["model.safetensors"] = 10**15
    code, _, err = ask(NAME)
    assert code == 1
    assert "must find enough disk space: it takes 1000000.0 GB" in err
    assert "--force" in err
    assert files_fetched(hub) == []
    code, out, err = ask(NAME, "--force", "--revision", "v2")
    assert code == 0, err
    assert json.loads(out)["generation_tokens"] == 2
    assert all(f"/{commit('v2')}/" in path for path in files_fetched(hub))


def test_a_download_must_fit_disk_and_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = {"disk": 100, "pages": 50}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=room["disk"]))
    monkeypatch.setattr(os, "sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else room["pages"])
    files = {"model.safetensors": 50, "tokenizer.json": 50}
    _require_room("org/name", files, tmp_path / "not" / "there" / "yet")
    for part, words in (("disk", "enough disk space"), ("pages", "enough memory")):
        room[part] -= 1
        with pytest.raises(NoRoomError, match=f"{words}.*or pass --force"):
            _require_room("org/name", files, tmp_path)
        room[part] += 1
    _require_room("org/name", files | {"more.json": 0}, tmp_path)


def test_a_revision_is_fetched_and_a_wrong_one_is_named(hub: Hub, tmp_path: Path) -> None:
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    words = ["convert", "--hf-path", NAME, "--mlx-path", tmp_path / "out", "--revision"]
    code, _, err = command(*words, "v9", environment=settings)
    assert code == 1
    assert "no such revision" in err
    assert "v9" in err
    code, _, err = command(*words, "v2", environment=settings)
    assert code == 0, err
    assert any(commit("v2") in path or "/v2/" in path for path in files_fetched(hub))
