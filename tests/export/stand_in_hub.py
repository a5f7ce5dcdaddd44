"""A stand-in for the Hub on this machine: it takes repositories and files, and remembers them."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What was uploaded.

    Args:
        endpoint: its address.
        repositories: id -> what was asked for when it was made.
        files: id -> path -> content.
        messages: of the commits.
        known: whether it knows who asks.
    """

    endpoint: str = ""
    repositories: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    known: bool = True

    def get(self, path: str) -> tuple[int, Any]:
        if path.startswith("/api/whoami"):
            return (200, {"name": "me", "type": "user", "orgs": []}) if self.known else (401, {"error": "who?"})
        repo = "/".join(path.split("/")[3:5])
        return (200, {"id": repo, "sha": "0" * 40, "siblings": []}) if repo in self.repositories else (404, {})

    def post(self, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.repositories[repo] = asked
            return 200, {"url": f"{self.endpoint}/{repo}", "name": repo}
        repo = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            return 200, {"files": [{**f, "shouldIgnore": False, "oid": None} for f in files]}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files.setdefault(repo, {})[line["value"]["path"]] = content
                elif line["key"] == "header":
                    self.messages.append(line["value"]["summary"])
            url = f"{self.endpoint}/{repo}/commit/{'1' * 40}"
            return 200, {"success": True, "commitOid": "1" * 40, "commitUrl": url, "hookOutput": ""}
        return 200, {}


@contextmanager
def stand_in_hub() -> Iterator[Hub]:
    """A hub that answers as long as the block runs."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(*hub.get(self.path))

        def do_POST(self) -> None:
            self.answer(*hub.post(self.path, self.body()))

        def body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def answer(self, status: int, content: Any) -> None:
            encoded = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(encoded)))
            self.end_headers()
            self.wfile.write(encoded)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
