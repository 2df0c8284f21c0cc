"""A Hugging Face hub on loopback: serves folders, breaks off, refuses, notes what it is asked."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """What the hub has and does.

    Attributes:
        models: Hub id to its folder, for each revision.
        gated: Ids that need a token.
        cut: Names of files whose first download breaks off in the middle.
        lie: Sizes that the listing gives instead of a file's own, by name.
        asked: Method, path and Range header of each request.
    """

    models: dict[str, dict[str, Path]]
    gated: set[str] = field(default_factory=set)
    cut: set[str] = field(default_factory=set)
    lie: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    url: str = ""


def commit(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


def make_handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def refuse(self, status: int, code: str, words: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", words)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def answer(self, *, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append((self.command, path, self.headers.get("Range")))
            listing = path.startswith("/api/models/")
            parts = path.removeprefix("/api/models/").strip("/").split("/")
            name = "/".join(parts[:2])
            revision = parts[3] if len(parts) > 3 else "main"
            revisions = hub.models.get(name)
            if revisions is None:
                return self.refuse(404, "RepoNotFound", "Repository not found")
            if name in hub.gated:
                return self.refuse(401, "GatedRepo", "Access to this model is restricted")
            folder = next((f for r, f in revisions.items() if revision in (r, commit(r))), None)
            if folder is None:
                return self.refuse(404, "RevisionNotFound", "Invalid rev id")
            sha = next(commit(r) for r, f in revisions.items() if f == folder)
            if listing:
                files = sorted(file for file in folder.iterdir() if file.is_file())
                tree = len(parts) > 2 and parts[2] == "tree"
                entries = [
                    {
                        "rfilename": file.name,
                        "path": file.name,
                        "type": "file",
                        "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
                        "blobId": hashlib.sha1(file.read_bytes()).hexdigest(),
                        "size": hub.lie.get(file.name, file.stat().st_size),
                    }
                    for file in files
                ]
                info = {"id": name, "sha": sha, "siblings": entries, "private": False, "tags": []}
                return self.reply(json.dumps(entries if tree else info).encode(), sha, body=body)
            file = folder / parts[-1]
            if not file.is_file():
                return self.refuse(404, "EntryNotFound", "Entry not found")
            return self.reply(file.read_bytes(), sha, body=body, name=file.name)

        def reply(self, content: bytes, sha: str, *, body: bool, name: str = "") -> None:
            start = 0
            if (wanted := self.headers.get("Range")) and name:
                start = int(wanted.removeprefix("bytes=").split("-")[0])
            rest = content[start:]
            self.send_response(206 if start else 200)
            if start:
                end = len(content) - 1
                self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
            self.send_header("Content-Length", str(len(rest)))
            self.send_header(
                "Content-Type", "application/octet-stream" if name else "application/json"
            )
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", sha)
            self.send_header("Accept-Ranges", "bytes")
            self.end_headers()
            if not body:
                return
            if name in hub.cut:
                hub.cut.discard(name)
                self.wfile.write(rest[: len(rest) // 2])
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
                return
            self.wfile.write(rest)

    return Handler


@contextmanager
def serving(models: dict[str, dict[str, Path]]) -> Iterator[Hub]:
    """Serve models on a free port of loopback."""
    hub = Hub(models)
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
