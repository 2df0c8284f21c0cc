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
        models: Hub id to its folder, for each revision; that of a data set has `datasets/` before.
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
    def entry(path: Path, folder: Path) -> dict[str, object]:
        """What listings say of a file or of a folder."""
        name, is_file = str(path.relative_to(folder)), path.is_file()
        content = path.read_bytes() if is_file else b""
        digest = hashlib.sha1(content).hexdigest()
        said: dict[str, object] = {"rfilename": name, "path": name, "oid": digest, "blobId": digest}
        if not is_file:
            return said | {"type": "directory"}
        return said | {"type": "file", "size": hub.lie.get(path.name, len(content))}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(body=True)

        def refuse(self, status: int, code: str, words: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", words)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def answer(self, *, body: bool) -> None:
            path, query = unquote(urlsplit(self.path).path), urlsplit(self.path).query
            hub.asked.append((self.command, path, self.headers.get("Range")))
            listing = path.startswith("/api/")
            parts = path.removeprefix("/api/").removeprefix("models/").strip("/").split("/")
            kind = [parts.pop(0)] if parts[0] == "datasets" else []
            name = "/".join([*kind, *parts[:2]])
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
                below = folder.joinpath(*parts[4:]).glob("*")
                every = [entry(file, folder) for file in sorted(folder.rglob("*"))]
                here = [entry(file, folder) for file in sorted(below)]
                info = {"id": name, "sha": sha, "private": False, "tags": []}
                info["siblings"] = [one for one in every if one["type"] == "file"]
                trees = {"tree": every if "recursive=True" in query else here}
                what = parts[2] if len(parts) > 2 else ""
                answer = (trees | {"paths-info": every}).get(what, info)
                return self.reply(json.dumps(answer).encode(), sha, body=body)
            file = folder.joinpath(*parts[4:])
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
