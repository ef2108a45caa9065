"""A hub on this machine that speaks as much of the real one's HTTP as its library asks for."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

REPOSITORY = "allenai/c4"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
#: Entries of one page of a folder's listing; the real hub has 1000.
PAGE = 3


class FakeHub(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.served: Counter[str] = Counter()
        """Bytes sent of each file."""
        self.asked: list[tuple[str, str]] = []
        """(path, Range) of every request."""
        self.tokens: set[str | None] = set()
        """What came as Authorization, except to the store."""
        self.store_tokens: set[str | None] = set()
        """What came as Authorization to the store, which must not learn a token."""
        self.cut: dict[str, int] = {}
        """Where the next answer with a file ends, without a word, after that many bytes."""
        self.hold: dict[str, int] = {}
        """Where every answer with a file stays open in silence after that many bytes, while it is in here."""
        self.changed: Counter[str] = Counter()
        """How many answers with a file are still to come damaged."""
        self.refusal = 0
        """HTTP status with which everything is refused."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def tree(self, folder: str) -> list[dict[str, object]]:
        names = [name for name in sorted(self.files) if name.rpartition("/")[0] == folder]
        entries: list[dict[str, object]] = [
            {"type": "directory", "oid": "0" * 40, "size": 0, "path": f"{folder}/sub"}
        ]
        for name in names:
            content = self.files[name]
            lfs = {
                "oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130,
            }  # fmt: skip
            entries.append(
                {"type": "file", "oid": "1" * 40, "size": len(content), "path": name, "lfs": lfs}
            )
        return entries


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_GET(self) -> None:
        hub, parts = self.server, urlsplit(self.path)
        hub.asked.append((parts.path, self.headers.get("Range", "")))
        tokens = hub.store_tokens if parts.path.startswith("/store/") else hub.tokens
        tokens.add(self.headers.get("Authorization"))
        tree = f"/api/datasets/{REPOSITORY}/tree/{COMMIT}/"
        file = f"/datasets/{REPOSITORY}/resolve/{COMMIT}/"
        if hub.refusal:
            self._answer(hub.refusal, b'{"error": "no"}')
        elif parts.path == f"/api/datasets/{REPOSITORY}":
            self._answer(200, json.dumps({"id": REPOSITORY, "sha": COMMIT}).encode())
        elif parts.path.startswith(tree):
            self._page(hub.tree(parts.path.removeprefix(tree)), parts.path, parts.query)
        elif parts.path.startswith(file) and parts.path.removeprefix(file) in hub.files:
            self.send_response(302)  # as the real one: to a store elsewhere, by a signed address
            store = f"http://localhost:{hub.server_address[1]}/store"
            name = parts.path.removeprefix(file)
            self.send_header("Location", f"{store}/{name}?Signature=s3cret")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif parts.path.startswith("/store/"):
            self._file(parts.path.removeprefix("/store/"))
        else:
            self._answer(404, b'{"error": "not found"}')

    def _page(self, entries: list[dict[str, object]], path: str, query: str) -> None:
        start = int(parse_qs(query).get("cursor", ["0"])[0])
        more = (
            {"Link": f'<{self.server.url}{path}?cursor={start + PAGE}>; rel="next"'}
            if start + PAGE < len(entries)
            else {}
        )
        self._answer(200, json.dumps(entries[start : start + PAGE]).encode(), more)

    def _file(self, name: str) -> None:
        hub, content = self.server, self.server.files[name]
        begin = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(begin[1]) if begin else 0
        body = content[start:]
        if hub.changed[name] > 0:
            hub.changed[name] -= 1
            body = bytes(len(body))
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        end = hub.hold.get(name, hub.cut.pop(name, len(body)))
        self.wfile.write(body[:end])
        self.wfile.flush()
        hub.served[name] += len(body[:end])
        while name in hub.hold:
            time.sleep(0.02)
        self.close_connection = True

    def _answer(self, code: int, body: bytes, more: dict[str, str] | None = None) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        for key, value in (more or {}).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[FakeHub]:
    hub = FakeHub(files)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
