"""A Hugging Face Hub of one dataset or model, as far as is asked of it: `with hub(files, fetched) as address`."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40


@contextmanager
def hub(
    files: dict[str, bytes], fetched: set[str], name: str = "some/one", kind: Literal["datasets", "models"] = "datasets"
) -> Iterator[str]:
    """Serve `files` as `name`; gives its address, for HF_ENDPOINT. What is asked for is `fetched`."""
    place = f"/datasets/{name}/resolve/" if kind == "datasets" else f"/{name}/resolve/"

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.tell(entries())

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            _, _, file = path.removeprefix(place).partition("/")  # after the revision
            if path.startswith(f"/api/{kind}/{name}/tree/"):
                self.tell(entries())
            elif path.startswith(f"/api/{kind}/{name}"):
                self.tell({"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]})
            elif path.startswith(place) and file in files:
                content = files[file]
                if self.command == "GET":
                    fetched.add(file)
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
                self.answer(200, content, headers)
            else:
                self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})

        def tell(self, what: object) -> None:
            self.answer(200, json.dumps(what).encode(), {"Content-Type": "application/json"})

        def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    def entries() -> list[dict[str, object]]:
        return [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in files.items()
        ]

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()  # looks so often for its end
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
