"""A small Hugging Face hub in a thread: enough of its HTTP interface for downloads by commit, and for uploads.

Written from the requests that huggingface_hub and datasets send; nothing of it is checked against the real hub.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"


class FakeHub:
    """`repos[kind, id]` is {commit: {path: bytes}}, oldest first; `refs` names commits besides main, the newest."""

    def __init__(self):
        self.clear()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def clear(self) -> None:
        self.repos: dict[tuple[str, str], dict[str, dict[str, bytes]]] = {}
        self.refs: dict[tuple[str, str, str], str] = {}
        self.private: dict[str, bool] = {}
        self.gated: set[str] = set()  # what nobody has access to yet
        self.asked: list[str] = []
        self.refuses = ""  # a part of a path that is answered with 500

    def environment(self, home: Path) -> dict[str, str]:
        """What makes a process use this hub and nothing else."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def add(self, kind: str, name: str, files: dict[str, bytes], ref: str | None = None) -> str:
        """A new commit of a repository."""
        commits = self.repos.setdefault((kind, name), {})
        commit = hashlib.sha1(f"{name} {len(commits)}".encode()).hexdigest()
        commits[commit] = files
        if ref:
            self.refs[kind, name, ref] = commit
        return commit

    def add_folder(self, name: str, folder: Path, ref: str | None = None) -> str:
        return self.add("models", name, {p.name: p.read_bytes() for p in folder.iterdir()}, ref)

    def commit(self, kind: str, name: str, revision: str) -> str | None:
        commits = self.repos.get((kind, name), {})
        if revision == "main":
            return next(reversed(commits), None)
        return self.refs.get((kind, name, revision), revision if revision in commits else None)

    # ---- requests

    def answer(self, request) -> None:
        path = unquote(urlsplit(request.path).path)
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        self.asked.append(f"{request.command} {path}")
        if self.refuses and self.refuses in path:
            return self.send(request, 500, b'{"error": "out of order"}')
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "repos"]:
            return self.create(request, json.loads(body))
        if parts == ["api", "validate-yaml"]:  # the card's metadata, before it is uploaded
            return self.send_json(request, {"errors": [], "warnings": []})
        if parts[0] == "api" and len(parts) >= 4:
            return self.api(request, parts[1], "/".join(parts[2:4]), parts[4:], body)
        kind, rest = ("datasets", parts[1:]) if parts[0] == "datasets" else ("models", parts)
        if len(rest) >= 5 and rest[2] == "resolve":
            return self.resolve(request, kind, "/".join(rest[:2]), rest[3], "/".join(rest[4:]))
        self.missing(request, "EntryNotFound")

    def api(self, request, kind: str, name: str, rest: list[str], body: bytes) -> None:
        action, revision = (rest + ["revision"])[0], (rest + ["", "main"])[1] or "main"
        if (kind, name) not in self.repos:
            return self.missing(request, "RepoNotFound")
        if action == "preupload":
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            return self.send_json(request, {"files": files})
        if action == "commit":
            return self.receive(request, kind, name, body)
        commit = self.commit(kind, name, revision)
        if commit is None:
            return self.missing(request, "RevisionNotFound")
        files = self.repos[kind, name][commit]
        if action == "tree":
            return self.send_json(request, tree(files, "/".join(rest[2:]), "recursive=true" in request.path.lower()))
        if action == "paths-info":
            return self.send_json(request, [entry(p, files[p]) for p in wanted(body) if p in files])
        if action != "revision":
            return self.missing(request, "EntryNotFound")
        siblings = [{"rfilename": p} for p in sorted(files)]
        self.send_json(request, {"id": name, "sha": commit, "private": self.private.get(name, False), "siblings": siblings, "tags": []})

    def create(self, request, wanted: dict) -> None:
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send(request, 401, b'{"error": "Invalid username or password."}')
        name = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
        known = ("models", name) in self.repos
        self.repos.setdefault(("models", name), {})
        if not known:
            self.private[name] = wanted.get("visibility") == "private" or wanted.get("private", False)  # huggingface_hub before 2
            self.add("models", name, {})
        self.send_json(request, {"url": f"{self.url}/{name}", "name": name}, 409 if known else 200)

    def receive(self, request, kind: str, name: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.decode().splitlines()]
        added = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
        before = self.repos[kind, name][self.commit(kind, name, "main")]
        commit = self.add(kind, name, before | added)
        self.send_json(request, {"commitUrl": f"{self.url}/{name}/commit/{commit}", "commitOid": commit})

    def resolve(self, request, kind: str, name: str, revision: str, path: str) -> None:
        if (kind, name) not in self.repos:
            return self.missing(request, "RepoNotFound")
        if name in self.gated:
            return self.send(request, 403, b'{"error": "restricted"}', {"X-Error-Code": "GatedRepo"})
        commit = self.commit(kind, name, revision)
        if commit is None:
            return self.missing(request, "RevisionNotFound")
        data = self.repos[kind, name][commit].get(path)
        if data is None:
            return self.missing(request, "EntryNotFound", {"X-Repo-Commit": commit})
        status = 200
        headers = {"X-Repo-Commit": commit, "ETag": f'"{blob_id(data)}"', "Accept-Ranges": "bytes"}
        if (span := request.headers.get("Range", "")).startswith("bytes="):
            first, _, last = span[6:].partition("-")
            end = min(int(last or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{end}/{len(data)}"
            status, data = 206, data[int(first) : end + 1]
        self.send(request, status, data, headers)

    def missing(self, request, code: str, headers: dict | None = None) -> None:
        self.send(request, 404, json.dumps({"error": code}).encode(), {"X-Error-Code": code, **(headers or {})})

    def send_json(self, request, value, status: int = 200) -> None:
        self.send(request, status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, request, status: int, body: bytes, headers: dict | None = None) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)


def entry(path: str, data: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}


def tree(files: dict[str, bytes], under: str, recursive: bool) -> list[dict]:
    """The folders and files below a path: all of them, or only the next level."""
    start = f"{under}/" if under else ""
    below = [p for p in sorted(files) if p.startswith(start)]
    folders = {
        start + "/".join(p.removeprefix(start).split("/")[:n]) for p in below for n in range(1, p.removeprefix(start).count("/") + 1)
    }
    entries = [{"type": "directory", "path": p, "size": 0, "oid": blob_id(p.encode())} for p in sorted(folders)]
    entries += [entry(p, files[p]) for p in below]
    return [e for e in entries if recursive or "/" not in e["path"].removeprefix(start)]


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def wanted(body: bytes) -> list[str]:
    """The paths that a paths-info request names: as JSON, or as a form."""
    try:
        paths = json.loads(body)["paths"]
    except ValueError:
        from urllib.parse import parse_qs

        paths = parse_qs(body.decode())["paths"]
    return [paths] if isinstance(paths, str) else paths
