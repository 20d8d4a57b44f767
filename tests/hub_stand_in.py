"""A stand-in for the Hub's HTTP interface, as far as creating a repository and committing needs it.

`Hub.start()` listens on this machine; `hub.repos` holds {name: {"private": .., "files": {path:
bytes}}}. Every request needs the token.
"""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_stand_in"


class Hub:
    """What was asked for, and what it led to."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []
        handler = type("Handler", (Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, value: Any, status: int = 200, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.answer(b"")

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            self.answer(b"".join(parts))
        else:
            self.answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def answer(self, body: bytes) -> None:
        path = self.path.partition("?")[0]
        self.hub.asked.append(f"{self.command} {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.reply({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", path):
            self.of_repo(found[1], found[2] or "", body)
        else:
            self.reply({"error": f"{path} is not stood in for"}, 404)

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name}
        if name in self.hub.repos:
            self.reply({"error": "You already created this model repo", **url}, 409)
        else:
            self.hub.repos[name] = {"private": _private(asked), "files": {}}
            self.reply(url)

    def of_repo(self, name: str, rest: str, body: bytes) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:
            self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif rest.startswith("/preupload/"):
            asked = json.loads(body)["files"]
            self.reply(
                {
                    "files": [
                        {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for file in asked
                    ]
                }
            )
        elif rest.startswith("/commit/"):
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    value = item["value"]
                    repo["files"][value["path"]] = base64.b64decode(value["content"])
            oid = f"{len(repo['files']):040d}"
            url = f"{self.hub.endpoint}/{name}/commit/{oid}"
            self.reply({"success": True, "commitOid": oid, "commitUrl": url})
        else:
            files = [{"rfilename": path} for path in repo["files"]]
            self.reply({"id": name, "modelId": name, "private": repo["private"], "tags": [],
                        "sha": "0" * 40, "siblings": files})  # fmt: skip


def _private(asked: dict[str, Any]) -> bool:
    """As newer and as older versions of huggingface_hub ask for it."""
    return asked.get("visibility") == "private" or bool(asked.get("private"))
