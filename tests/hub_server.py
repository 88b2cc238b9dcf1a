"""A stand-in for the Hugging Face hub on 127.0.0.1, used by the real client:
repositories are folders, and tests can inject faults.

By hand, to serve every `owner/name` folder of models and `datasets/owner/name` of data
sets below a folder:

    python tests/hub_server.py FOLDER 8000      # then HF_ENDPOINT=http://127.0.0.1:8000
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

BRANCHES = {"main": "", "refs/convert/parquet": "-converted"}  # branch -> ending of the folder's name
API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Hub:
    """The server. `repositories` maps names such as `owner/name` and
    `datasets/owner/name` to folders; `requests` records all requests.

    `changes` replaces entries of the answer about a repository.

    `fault(method, path, headers)` may return (status, headers) as the answer, or (None,
    damage) to send `damage(content)`; a shorter content looks like a broken connection.
    With (206, damage) the server announces the new length.
    """

    def __init__(self, repositories: dict[str, Path], port: int = 0):
        self.repositories, self.requests = repositories, []
        self.changes: dict = {}  # replaces entries of the answer about a repository
        self.fault: Callable = lambda method, path, headers: None
        self.server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.server.handle_error = lambda request, address: None  # a client that has gone away is part of the tests
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def folder(self, name: str, revision: str) -> Path | None:
        """The folder of a branch or commit."""
        for branch, ending in BRANCHES.items():
            folder = self.repositories.get(name + ending)
            if folder is not None and revision in (branch, commit_of(folder)):
                return folder
        return None

    def asked(self, method: str, ending: str = "") -> list[str]:
        return [path for m, path in self.requests if m == method and path.endswith(ending)]


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def commit_of(folder: Path) -> str:
    """Return an id that changes like a commit, with the name, size or time of any
    file.
    """
    about = [(name, (folder / name).stat().st_size, (folder / name).stat().st_mtime_ns) for name in files_of(folder)]
    return hashlib.sha1(json.dumps(about).encode()).hexdigest()


def is_large(name: str) -> bool:
    """Tell whether a file is stored outside git and identified by its sha256."""
    return name.endswith((".safetensors", ".parquet", ".bin", ".gguf"))


def names_of(path: Path) -> tuple[str, str]:
    """Return git's hash of a file, and its sha256."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), hashlib.sha256(content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def answer(self, status: int, headers: dict | None = None, body: bytes = b"") -> None:
        headers = {"Content-Length": str(len(body))} | (headers or {})
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            if int(headers["Content-Length"]) != len(body):
                self.close_connection = True

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        status, what = self.hub.fault(self.command, path, self.headers) or (None, lambda content: content)
        if not callable(what):
            return self.answer(status, what)
        if found := API.fullmatch(path):
            return self.api(("" if found[1] == "models" else "datasets/") + found[2], found[4] or "main", found[3])
        if found := FILE.fullmatch(path):
            return self.file((found[1] or "") + found[2], found[3], found[4], what, honest=status == 206)
        return self.answer(404)

    do_HEAD = do_GET

    def api(self, name: str, revision: str, form: str | None) -> None:
        if name not in self.hub.repositories and f"{name}-converted" not in self.hub.repositories:
            return self.answer(401, {"X-Error-Code": "RepoNotFound"})
        folder = self.hub.folder(name, revision)
        if folder is None:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        files = []
        for file in files_of(folder):
            git, sha256 = names_of(folder / file)
            about = {"rfilename": file, "size": (folder / file).stat().st_size, "blobId": git}
            if is_large(file):
                about["lfs"] = {"sha256": sha256, "size": about["size"], "pointerSize": 134}
            files.append(about)
        found = {"id": name.removeprefix("datasets/"), "sha": commit_of(folder), "siblings": files} | self.hub.changes
        if form == "tree":  # the request of the client's own snapshot_download
            found = [{"type": "file", "path": file["rfilename"], "size": file["size"], "oid": file["blobId"]} for file in files]
        return self.answer(200, {"Content-Type": "application/json"}, json.dumps(found).encode())

    def file(self, name: str, revision: str, file: str, damage: Callable[[bytes], bytes], honest: bool) -> None:
        folder = self.hub.folder(name, revision)
        if folder is None or not (folder / file).is_file():
            return self.answer(404, {"X-Error-Code": "EntryNotFound" if folder else "RepoNotFound"})
        content = (folder / file).read_bytes()
        tag = names_of(folder / file)[is_large(file)]
        headers = {"X-Repo-Commit": commit_of(folder), "ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
        if is_large(file):
            headers |= {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(content))}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start is None:
            sent = damage(content)
            return self.answer(200, headers | {"Content-Length": str(len(sent if honest else content))}, sent)
        at = int(start[1])
        headers["Content-Range"] = f"bytes {at}-{len(content) - 1}/{len(content)}"
        return self.answer(206, headers | {"Content-Length": str(len(content) - at)}, content[at:])


def repositories_in(root: Path) -> dict[str, Path]:
    """Every `owner/name` and `datasets/owner/name` below a folder."""
    folders = [path for path in (*root.glob("*/*"), *root.glob("datasets/*/*")) if path.is_dir()]
    return {path.relative_to(root).as_posix(): path for path in folders}


if __name__ == "__main__":
    hub = Hub(repositories_in(Path(sys.argv[1])), int(sys.argv[2]))
    print(f"HF_ENDPOINT={hub.url}", flush=True)
    while True:
        time.sleep(3600)
