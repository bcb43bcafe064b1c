"""A Hugging Face hub on loopback that takes models: the endpoints that huggingface_hub's client calls for an upload.

`repos` holds what was committed, byte for byte. Set `fail` to a status code to have every commit refused.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGE = (".safetensors", ".gguf")


class Hub:
    """The state of the hub."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.tokens: set[str | None] = set()
        self.requests: list[str] = []
        self.fail: int | None = None
        self.objects: dict[str, bytes] = {}
        self.url = ""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, value: Any, status: int = 200, **headers: str) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(content)

    def _note(self) -> str:
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        # An upload goes to a signed address, and the client asks once, without a token, whether an agent drives it.
        if not path.startswith(("/object/", "/api/agent-harnesses")):
            self.hub.tokens.add(self.headers.get("Authorization"))
        return path

    def do_GET(self) -> None:
        repo = self._note().removeprefix("/api/models/")
        if repo not in self.hub.repos:
            return self._send({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        names = [{"rfilename": name} for name in self.hub.repos[repo]]
        self._send({"id": repo, "modelId": repo, "private": self.hub.private[repo], "siblings": names, "tags": []})

    def do_PUT(self) -> None:
        digest = self._note().removeprefix("/object/")
        content = self._body()
        assert hashlib.sha256(content).hexdigest() == digest
        self.hub.objects[digest] = content
        self._send({})

    def do_POST(self) -> None:
        path, body = self._note(), self._body()
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.hub.repos[repo], self.hub.private[repo] = (
                {},
                bool(asked.get("private")) or asked.get("visibility") == "private",
            )
            self._send({"url": f"{self.hub.url}/{repo}", "name": repo, "id": "1"})
        elif path == "/api/validate-yaml":
            self._send({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular"}
                for file in files
            ]
            self._send({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    **wanted,
                    "authenticated": True,
                    "actions": {"upload": {"href": f"{self.hub.url}/object/{wanted['oid']}", "header": {}}},
                }
                for wanted in json.loads(body)["objects"]
            ]
            self._send({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            self._commit(path.removeprefix("/api/models/").partition("/commit/")[0], body)
        else:
            self._send({"error": f"no such endpoint {path}"}, 404)

    def _commit(self, repo: str, body: bytes) -> None:
        if self.hub.fail is not None:
            return self._send({"error": "refused by the test"}, self.hub.fail)
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif entry["key"] == "file":
                self.hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.hub.repos[repo][value["path"]] = self.hub.objects[value["oid"]]
        oid = "0" * 40
        self._send({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})


@contextlib.contextmanager
def hub_server() -> Iterator[Hub]:
    """A hub that forgets everything at the end of the block; give its `url` to the client as HF_ENDPOINT."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
