"""`flash-mlx serve` in a process of its own, asked by OpenAI's own client and by rude ones."""

import base64
import io
import json
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from commands import make_drafter, start
from flash_mlx.cli import run
from flash_mlx.generate import Model, generate, load
from tiny import build_llava, edit_json, random_image

openai = pytest.importorskip("openai")  # of the extra `test`
httpx = pytest.importorskip("httpx")  # which comes with it

KEY = "open-sesame"
PICTURE = random_image(seed=3)
SETTINGS: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0}


def data_uri(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    url: str
    model: Path
    drafter: Path
    client: Any
    rude: Any

    def ask(self, content: object, **settings: Any) -> Any:
        messages: Any = [{"role": "user", "content": content}]
        return self.client.chat.completions.create(
            model=str(self.model), messages=messages, **{**SETTINGS, **settings}
        )

    def post(self, body: bytes, **headers: str) -> Any:
        fields = {"content-type": "application/json", "authorization": f"Bearer {KEY}", **headers}
        return self.rude.post(f"{self.url}/chat/completions", content=body, headers=fields)

    def active(self) -> int:
        return self.rude.get(self.url.removesuffix("/v1") + "/health").json()["requests"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = build_llava(tmp_path_factory.mktemp("model"), max_position_embeddings=100_000)
    edit_json(model, "config.json", eos_token_id=399)
    edit_json(model, "generation_config.json", eos_token_id=399)
    drafter = make_drafter(tmp_path_factory.mktemp("drafter"))
    process = start("serve", "--model", model, "--draft-model", drafter, "--port", 0,
                    "--draft-block-size", 3,
                    "--max-waiting", 4, "--max-body-mb", 1, "--max-megapixels", 1,
                    "--max-tokens", 90_000, environment={"FLASH_MLX_API_KEY": KEY})  # fmt: skip
    line = process.stderr.readline().decode()
    found = re.search(r"http://\S+/v1", line)
    assert found, line + process.stderr.read().decode()
    client = openai.OpenAI(base_url=found[0], api_key=KEY, max_retries=0, timeout=60)
    with client, httpx.Client(timeout=60) as rude:
        yield Server(process, found[0], model, drafter, client, rude)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err.decode()[-2000:]
    assert "Traceback" not in err.decode()


@pytest.fixture(scope="module")
def model(server: Server) -> Model:
    return load(server.model, server.drafter, draft_block_size=3)


def test_an_answer_is_that_of_generate(server: Server, model: Model) -> None:
    picture = {"type": "image_url", "image_url": {"url": data_uri(PICTURE)}}
    expected = generate(model, "What is this?", PICTURE, **SETTINGS)
    got = server.ask([picture, {"type": "text", "text": "What is this?"}])
    (choice,) = got.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == expected.finish_reason == "length"
    assert (got.object, got.model) == ("chat.completion", str(server.model))
    assert got.usage.prompt_tokens == expected.prompt_tokens
    assert got.usage.completion_tokens == 12
    assert got.usage.total_tokens == 12 + expected.prompt_tokens
    details = got.usage.completion_tokens_details
    assert details.accepted_prediction_tokens == expected.stats.accepted
    assert details.rejected_prediction_tokens == expected.stats.drafted - expected.stats.accepted
    assert got.timings["draft_n"] == expected.stats.drafted > 0
    assert got.timings["mean_acceptance_length"] == expected.stats.mean_acceptance_length
    assert min(got.timings["prompt_ms"], got.timings["predicted_per_second"]) > 0


def test_a_stream_is_the_same_text_in_pieces(server: Server, model: Model) -> None:
    pieces = list(server.ask("Hello.", stream=True, stream_options={"include_usage": True}))
    expected = generate(model, "Hello.", **SETTINGS)
    *texts, end, usage = pieces
    assert "".join(piece.choices[0].delta.content for piece in texts) == expected.text
    assert len(texts) > 3
    assert [piece.choices[0].finish_reason for piece in texts] == [None] * len(texts)
    assert end.choices[0].finish_reason == "length"
    assert end.timings["predicted_n"] == 12
    assert (usage.choices, usage.usage.completion_tokens) == ([], 12)
    assert len({piece.id for piece in pieces}) == 1
    assert list(server.ask("Hello.", stream=True))[-1].choices


def test_settings_reach_the_text(server: Server, model: Model) -> None:
    def text(**settings: Any) -> str:
        return server.ask("Hello.", **settings).choices[0].message.content

    free = text()
    sampled = {"temperature": 0.9, "top_p": 0.9, "seed": 3}
    assert text(**sampled) == generate(model, "Hello.", **{**SETTINGS, **sampled}).text != free
    assert text(stop=[free[4:6]]) == free[: free.index(free[4:6])]
    penalty = {"presence_penalty": 1.5, "frequency_penalty": 0.5}
    assert text(**penalty) == generate(model, "Hello.", **{**SETTINGS, **penalty}).text
    first = generate(model, "Hello.", **SETTINGS).token_ids[0]
    assert text(logit_bias={str(first): -100}) != free
    assert (
        server.ask("Hello.", max_tokens=None, max_completion_tokens=3).usage.completion_tokens == 3
    )


def test_a_conversation_with_pictures_in_its_turns(server: Server) -> None:
    picture = {"type": "image_url", "image_url": {"url": data_uri(PICTURE)}}

    def ask(first: list[object], last: list[object]) -> Any:
        turns: Any = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [*first, {"type": "text", "text": "One."}]},
            {"role": "assistant", "content": "Two."},
            {"role": "user", "content": [*last, {"type": "text", "text": "Three."}]},
        ]
        return server.client.chat.completions.create(
            model=str(server.model), messages=turns, **SETTINGS
        )

    early, late, both = ask([picture], []), ask([], [picture]), ask([picture], [picture])
    assert early.usage.prompt_tokens == late.usage.prompt_tokens
    assert both.usage.prompt_tokens > early.usage.prompt_tokens
    assert early.choices[0].message.content != late.choices[0].message.content


def test_models_and_health(server: Server) -> None:
    assert [each.id for each in server.client.models.list()] == [str(server.model)]
    assert server.rude.get(server.url.removesuffix("/v1") + "/health").json()["status"] == "ok"


BOMB = Image.new("L", (1200, 1000))
BAD: dict[str, tuple[int, dict[str, Any], str]] = {
    "no messages": (400, {"messages": []}, "at least one"),
    "no text": (400, {"messages": [{"role": "user", "content": 3}]}, "must be text"),
    "no role": (400, {"messages": [{"content": "Hi."}]}, "role"),
    "other role": (400, {"messages": [{"role": "tool", "content": "Hi."}]}, "role"),
    "last": (400, {"messages": [{"role": "assistant", "content": "Hi."}]}, "last message"),
    "unknown": (400, {"warmth": 3}, "'warmth' is not known"),
    "many": (400, {"n": 2}, "n must be 1"),
    "tools": (400, {"tools": [{"type": "function"}]}, "tools"),
    "hot": (400, {"temperature": "hot"}, "temperature must be a number"),
    "cold": (400, {"temperature": -1}, "temperature"),
    "nan": (400, {"top_p": float("nan")}, "top_p"),
    "tokens": (400, {"max_tokens": 0}, "must be a whole number, 1 or"),
    "too many tokens": (400, {"max_tokens": 10**9}, "at most 90000"),
    "stop": (400, {"stop": [""]}, "stop string"),
    "bias": (400, {"logit_bias": {"a": 1}}, "logit_bias"),
    "far bias": (400, {"logit_bias": {"100000": 1}}, "400 tokens"),
    "stream": (400, {"stream": "yes"}, "stream must be"),
    "model": (404, {"model": "gpt"}, "gpt"),
}
URIS: dict[str, tuple[str, str]] = {
    "http": ("http://127.0.0.1:1/a.png", "fetches nothing"),
    "file": ("file:///etc/passwd", "fetches nothing"),
    "path": ("/etc/passwd", "fetches nothing"),
    "base64": ("data:image/png;base64,@@@@", "base64"),
    "plain": ("data:image/png,abc", "base64"),
    "text": ("data:image/png;base64,aGVsbG8=", "it is none"),
    "bomb": (data_uri(BOMB), "at most 1000000 pixels"),
}


@pytest.mark.parametrize("kind", [*BAD, *URIS])
def test_bad_requests_are_named_and_harm_nobody(server: Server, kind: str) -> None:
    status, changes, part = BAD.get(kind) or (400, {}, URIS[kind][1])
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi."}], "max_tokens": 2}
    if kind in URIS:
        picture = {"type": "image_url", "image_url": {"url": URIS[kind][0]}}
        body["messages"] = [{"role": "user", "content": [picture]}]
    for stream in (True, False):
        response = server.post(json.dumps({"stream": stream, **body, **changes}).encode())
        assert response.status_code == status, response.text
        assert part in response.json()["error"]["message"]
        assert "\n" not in response.json()["error"]["message"]
    assert server.active() == 0


def test_bodies_that_are_no_requests(server: Server) -> None:
    for body in (b"", b"{", b"[1]", b"\xff", b"[" * 100_000):
        assert server.post(body).status_code == 400
    assert server.post(b"{}", **{"content-type": "text/plain"}).status_code == 415
    assert server.post(b"x" * 1_100_000).status_code == 413
    assert server.post(b"{}", authorization="Bearer wrong").status_code == 401
    assert server.post(b"{}", authorization="").status_code == 401
    assert server.post(b"{}", host="evil.example").status_code == 400
    assert server.rude.get(f"{server.url}/models").status_code == 401
    with pytest.raises(openai.AuthenticationError):
        server.client.with_options(api_key="wrong").models.list()
    assert server.ask("Hello.").usage.completion_tokens == 12


def wait_until_idle(server: Server) -> None:
    end = time.monotonic() + 30
    while server.active():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_client_that_leaves_ends_its_answer(server: Server) -> None:
    stream = server.ask("Go on.", stream=True, max_tokens=90_000)
    next(iter(stream))
    assert server.active() == 1
    stream.close()
    wait_until_idle(server)
    host, port = server.url.removeprefix("http://").removesuffix("/v1").split(":")
    body = json.dumps({"messages": [{"role": "user", "content": "Hi."}], "max_tokens": 90_000})
    with socket.create_connection((host, int(port))) as rude:
        rude.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        while not server.active():
            time.sleep(0.01)
    wait_until_idle(server)
    started = time.monotonic()
    assert server.ask("Hello.").usage.completion_tokens == 12
    assert time.monotonic() - started < 20


def test_a_hundred_clients_at_once(server: Server) -> None:
    expected = server.ask("Hello.").choices[0].message.content

    def one(number: int) -> str:
        try:
            return server.ask("Hello.").choices[0].message.content
        except openai.RateLimitError as error:
            return "later: " + error.response.headers["retry-after"]

    with ThreadPoolExecutor(100) as clients:
        said = list(clients.map(one, range(100)))
    assert set(said) <= {expected, "later: 1"}
    assert said.count(expected) >= 5
    wait_until_idle(server)


def test_beyond_the_queue_a_client_is_told_to_come_back(server: Server) -> None:
    stream = server.ask("Go on.", stream=True, max_tokens=90_000)
    next(iter(stream))
    with ThreadPoolExecutor(4) as clients:
        waiting = [clients.submit(server.ask, "Hello.") for _ in range(4)]
        while server.active() < 5:
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError) as refusal:
            server.ask("Hello.")
        stream.close()
        assert [each.result().usage.completion_tokens for each in waiting] == [12] * 4
    assert refusal.value.response.headers["retry-after"] == "1"
    wait_until_idle(server)


def test_what_was_read_is_not_read_again(server: Server, model: Model) -> None:
    picture = {"type": "image_url", "image_url": {"url": data_uri(random_image(seed=8))}}

    def ask(question: str) -> Any:
        return server.ask([picture, {"type": "text", "text": question}])

    first, second, again = ask("What is this?"), ask("What is that, there?"), ask("What is this?")
    assert first.usage.prompt_tokens_details.cached_tokens < 10  # the words before any picture
    assert second.usage.prompt_tokens_details.cached_tokens > 16
    assert again.choices[0].message.content == first.choices[0].message.content
    expected = generate(model, "What is that, there?", random_image(seed=8), **SETTINGS)
    assert second.choices[0].message.content == expected.text


def test_a_video_in_a_request(server: Server, tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    file = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"mp4v"), 4, (40, 40))
    for seed in range(8):
        writer.write(np.array(random_image(40, 40, seed=seed)))
    writer.release()
    uri = "data:video/mp4;base64," + base64.b64encode(file.read_bytes()).decode()
    text = {"type": "text", "text": "What moves?"}
    got = server.ask([{"type": "video_url", "video_url": {"url": uri}}, text])
    assert got.usage.prompt_tokens > server.ask([text]).usage.prompt_tokens
    torn = uri[: uri.index(",") + 1 + 400]  # whole groups of four: base64, but no whole clip
    with pytest.raises(openai.BadRequestError, match="video"):
        server.ask([{"type": "video_url", "video_url": {"url": torn}}, text])


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_it_serves_at_an_ipv6_address(tiny_llava: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 loopback here")
    process = start("serve", "--model", tiny_llava, "--host", "::1", "--port", 0)
    try:
        line = process.stderr.readline().decode()
        while "Serving" not in line:
            assert line, "the server ended"
            line = process.stderr.readline().decode()
        url = line.split()[-1]
        assert url.startswith("http://[::1]:")
        with httpx.Client(timeout=60) as client:
            health = url.removesuffix("/v1") + "/health"
            assert client.get(health).json()["status"] == "ok"
            assert client.get(health, headers={"host": "evil.example"}).status_code == 400
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)


@pytest.mark.parametrize("words", [
    ["--max-body-mb", "1e308"], ["--max-megapixels", "1e308"], ["--cache-gb", "1e308"],
    ["--max-body-mb", "inf"], ["--max-waiting", "-1"],
])  # fmt: skip
def test_limits_without_measure_are_wrong_usage(
    words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["serve", "--port", "0", *words]) == 2
    assert len(capfd.readouterr().err.splitlines()) == 1
    assert run(["serve", "--port", "0", "--host", "no.such.host.invalid", "--model", "/none"]) == 1
    assert "--host" in capfd.readouterr().err


def test_what_cannot_be_served_is_one_line(
    tiny_llava: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert run(["serve", "--model", "/none", "--port", str(taken.getsockname()[1])]) == 1
    first = capfd.readouterr().err
    assert run(["serve", "--model", "/none", "--port", "0"]) == 1
    second = capfd.readouterr().err
    assert len(first.splitlines()) == len(second.splitlines()) == 1
    assert "in use" in first
    assert "/none" in second
    assert run(["serve", "--port", "0", "--api-key", " "]) == 2


def test_an_empty_key_is_not_no_key(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLASH_MLX_API_KEY", "")
    assert run(["serve", "--port", "0"]) == 2
    assert "not empty" in capfd.readouterr().err
