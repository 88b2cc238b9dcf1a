"""A stand-in for Google Cloud Storage: the part of its JSON API that gcsfs, tensorstore
and orbax call, over HTTP, with objects in memory.

Writes are atomic and honour `ifGenerationMatch`, as in the cloud. `Bucket.fails` makes
requests fail: a function (method, path) -> HTTP status, or None to go on.

    python tests/fake_gcs.py PORT        # by hand
"""

from __future__ import annotations

import contextlib
import email
import email.policy
import http.server
import itertools
import json
import re
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator

NAME = "bucket"
BOUNDARY = "batch"


class Bucket:
    def __init__(self):
        self.objects: dict[str, tuple[bytes, int]] = {}  # name -> contents, generation
        self.uploads: dict[str, tuple[str, bytearray]] = {}  # resumable ones: id -> name, contents so far
        self.numbers, self.busy = itertools.count(1), threading.RLock()
        self.fails: Callable[[str, str], int | None] = lambda method, path: None
        self.calls: list[str] = []

    def put(self, name: str, contents: bytes) -> dict:
        self.objects[name] = (contents, next(self.numbers))
        return self.describe(name)

    def describe(self, name: str) -> dict:
        contents, generation = self.objects[name]
        return {
            "kind": "storage#object",
            "bucket": NAME,
            "name": name,
            "id": f"{NAME}/{name}/{generation}",
            "size": str(len(contents)),
            "generation": str(generation),
            "metageneration": "1",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
            "contentType": "application/octet-stream",
        }

    def listing(self, query: dict[str, str]) -> dict:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        first, last = query.get("startOffset", ""), query.get("endOffset", "")
        items, prefixes = [], []
        for name in sorted(self.objects):
            if not name.startswith(prefix) or name < first or (last and name >= last):
                continue
            head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            if found and f"{prefix}{head}{delimiter}" not in prefixes:
                prefixes.append(f"{prefix}{head}{delimiter}")
            elif not found:
                items.append(self.describe(name))
        return {"kind": "storage#objects", "items": items, "prefixes": prefixes}


class Refused(Exception):
    def __init__(self, status: int):
        self.status = status


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: Bucket

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_one()

    do_POST = do_PUT = do_DELETE = do_PATCH = do_GET

    def handle_one(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.bucket.busy:
            status, headers, answer = respond(
                self.bucket, self.command, self.path, self.headers, body, f"http://{self.headers['Host']}"
            )
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(answer)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_) -> None:  # a client that is killed breaks its connections
        pass


def respond(bucket: Bucket, method: str, path: str, headers, body: bytes, host: str = "") -> tuple[int, dict, bytes]:
    """Return status, headers and body of the answer to a request."""
    where = urllib.parse.urlsplit(path)
    query = dict(urllib.parse.parse_qsl(where.query, keep_blank_values=True))
    bucket.calls.append(f"{method} {path}")
    try:
        if (status := bucket.fails(method, urllib.parse.unquote(path))) is not None:
            raise Refused(status)
        made = route(bucket, method, where.path, query, headers, body, host)
        return made if isinstance(made, tuple) else (200, {"Content-Type": "application/json"}, json.dumps(made).encode())
    except Refused as refused:
        error = {"error": {"code": refused.status, "message": f"status {refused.status}", "errors": []}}
        return refused.status, {"Content-Type": "application/json"}, b"" if refused.status == 304 else json.dumps(error).encode()


def route(bucket: Bucket, method: str, path: str, query: dict[str, str], headers, body: bytes, host: str):
    if path.startswith("/batch/"):
        return batch(bucket, headers, body)
    if found := re.fullmatch(rf"/upload/storage/v1/b/{NAME}/o", path):
        return upload(bucket, method, query, headers, body, host)
    if re.fullmatch(rf"/storage/v1/b/{NAME}", path):
        return {"kind": "storage#bucket", "name": NAME, "location": "US", "locationType": "region"}
    if re.fullmatch(rf"/storage/v1/b/{NAME}/storageLayout", path):
        return {"bucket": NAME, "location": "US", "locationType": "region", "hierarchicalNamespace": {"enabled": False}}
    if re.fullmatch(rf"/storage/v1/b/{NAME}/o", path) and method == "GET":
        return bucket.listing(query)
    if found := re.fullmatch(rf"/storage/v1/b/{NAME}/o/([^/]+)/(?:rewriteTo|copyTo)/b/{NAME}/o/([^/]+)", path):
        source, target = map(urllib.parse.unquote, found.groups())
        check(bucket, source, {})
        return {"done": True, "resource": bucket.put(target, bucket.objects[source][0])}
    if found := re.fullmatch(rf"/storage/v1/b/{NAME}/o/([^/]+)/moveTo/o/([^/]+)", path):
        source, target = map(urllib.parse.unquote, found.groups())
        check(bucket, source, {})
        return bucket.put(target, bucket.objects.pop(source)[0])
    if found := re.fullmatch(rf"(?:/download)?/storage/v1/b/{NAME}/o/(.+)", path):
        return one_object(bucket, method, urllib.parse.unquote(found[1]), query, headers)
    raise Refused(404)


def check(bucket: Bucket, name: str, query: dict[str, str], missing: int = 404) -> None:
    """Raise Refused if the object does not exist, or not in the generation wanted."""
    generation = bucket.objects[name][1] if name in bucket.objects else 0
    if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
        raise Refused(412)
    if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == generation:
        raise Refused(304)
    if missing and not generation:
        raise Refused(missing)


def one_object(bucket: Bucket, method: str, name: str, query: dict[str, str], headers):
    check(bucket, name, query)
    contents, generation = bucket.objects[name]
    if method == "DELETE":
        del bucket.objects[name]
        return 204, {}, b""
    if query.get("alt") != "media":
        return bucket.describe(name)
    answer = {"x-goog-generation": str(generation), "Content-Type": "application/octet-stream"}
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("Range") or "")
    if wanted is None or not contents:
        return 200, answer, contents
    first = int(wanted[1]) if wanted[1] else max(0, len(contents) - int(wanted[2]))
    last = min(len(contents) - 1, int(wanted[2])) if wanted[1] and wanted[2] else len(contents) - 1
    if first >= len(contents):
        raise Refused(416)
    return 206, answer | {"Content-Range": f"bytes {first}-{last}/{len(contents)}"}, contents[first : last + 1]


def upload(bucket: Bucket, method: str, query: dict[str, str], headers, body: bytes, host: str):
    kind = query.get("uploadType")
    if kind == "media":
        check(bucket, query["name"], query, missing=0)
        return bucket.put(query["name"], body)
    if kind == "multipart":
        about, contents = parts(headers, body)
        name = query.get("name") or json.loads(about)["name"]
        check(bucket, name, query, missing=0)
        return bucket.put(name, contents)
    if "upload_id" not in query:  # a resumable upload begins
        name = query.get("name") or json.loads(body)["name"]
        check(bucket, name, query, missing=0)
        number = str(next(bucket.numbers))
        bucket.uploads[number] = (name, bytearray())
        return 200, {"Location": f"{host}/upload/storage/v1/b/{NAME}/o?uploadType=resumable&upload_id={number}"}, b"{}"
    if method == "DELETE":  # the upload is cancelled
        bucket.uploads.pop(query["upload_id"], None)
        return 499, {}, b""
    name, contents = bucket.uploads[query["upload_id"]]
    contents.extend(body)
    if (headers.get("Content-Range") or "/x").rpartition("/")[2] == "*":  # more follows
        return 308, {"Range": f"bytes=0-{len(contents) - 1}"} if contents else {}, b""
    return bucket.put(name, bytes(contents))


def parts(headers, body: bytes) -> list[bytes]:
    """Return the bodies of a multipart request; they may contain any bytes."""
    boundary = b"--" + re.search(r'boundary="?([^";]+)', headers["Content-Type"])[1].encode()
    found = body.split(boundary)[1:-1]
    bodies = [re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in found]
    return [part.removesuffix(b"\n").removesuffix(b"\r") for part in bodies]


def batch(bucket: Bucket, headers, body: bytes):
    """Answer several requests that came in one."""
    answers = []
    for part in parts(headers, body):
        line, _, rest = part.decode().lstrip().partition("\n")
        method, path = line.split()[:2]
        status, _, answer = respond(bucket, method, path, email.message_from_string(rest, policy=email.policy.default), b"")
        answers.append(f"--{BOUNDARY}\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status} x\r\n\r\n{answer.decode()}\r\n")
    return 200, {"Content-Type": f"multipart/mixed; boundary={BOUNDARY}"}, ("".join(answers) + f"--{BOUNDARY}--").encode()


@contextlib.contextmanager
def serving(port: int = 0) -> Iterator[tuple[Bucket, dict[str, str]]]:
    """Serve a bucket; yield it, and the environment variables that lead to it."""
    bucket = Bucket()
    server = Server(("127.0.0.1", port), type("Handler", (Handler,), {"bucket": bucket}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    names = {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url, "GOOGLE_CLOUD_PROJECT": "project"}
    try:
        yield bucket, names | {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "NO_GCE_CHECK": "true"}
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    with serving(int(sys.argv[1])) as (made, variables):
        print("\n".join(f"export {key}={value}" for key, value in variables.items()), flush=True)
        threading.Event().wait()
