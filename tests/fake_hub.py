"""A small Hugging Face hub on this machine: the part of its HTTP interface that pushing and loading a model take.

Files are kept in memory, commits whole. Of large files the LFS protocol is spoken (HF_HUB_DISABLE_XET=1).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

WRITER, READER = "hf_writer", "hf_reader"
"""Tokens of the user ``me``."""
RELATIONS = ("adapter", "finetune", "merge", "quantized")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class Repository:
    """Commits by their name, each all files with whether they are large ones, and branches."""

    private: bool = False
    commits: dict[str, dict[str, tuple[bytes, bool]]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, tuple[bytes, bool]], message: str) -> str:
        name = hashlib.sha1(f"{branch}{len(self.commits)}{message}".encode()).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        self.messages.append(message)
        return name

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return {name: data for name, (data, _) in self.commits[self.branches[branch]].items()}


class Hub(ThreadingHTTPServer):
    """The server; `requests` are those it got, `broken` a pattern of requests that it refuses, with 400."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.broken: str | None = None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def hold(self, name: str, folder: Path) -> str:
        """A commit of all files of a folder; its name."""
        files = {file.name: (file.read_bytes(), file.suffix == ".safetensors") for file in folder.iterdir()}
        return self.repositories.setdefault(name, Repository()).commit("main", files, "held")


class Answer(Exception):
    """What is answered in place of what was asked for."""

    def __init__(self, status: int, message: str = "", code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = f"{self.command} {path}"
        self.server.requests.append(asked)
        try:
            if self.server.broken and re.search(self.server.broken, asked):
                raise Answer(400, "broken")
            for pattern, method in ROUTES.items():
                match = re.fullmatch(pattern, asked)
                if match:
                    method(self, *match.groups(), body) if self.command in ("POST", "PUT") else method(
                        self, *match.groups()
                    )
                    return
            raise Answer(404, f"no such route: {asked}", "EntryNotFound")
        except Answer as answer:
            told = {"X-Error-Message": answer.message, **({"X-Error-Code": answer.code} if answer.code else {})}
            self._send(json.dumps({"error": answer.message}).encode(), answer.status, told)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, content: Any, status: int = 200) -> None:
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json"})

    def _may_write(self, name: str) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in (WRITER, READER):
            raise Answer(401, "Invalid username or password.")
        if token != WRITER or not name.startswith("me/"):
            raise Answer(403, "You don't have the rights to write here")

    def _at(self, name: str, revision: str = "main") -> tuple[Repository, str]:
        repository = self.server.repositories.get(name)
        if repository is None:
            raise Answer(404, "Repository not found", "RepoNotFound")
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            raise Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository, commit

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        self._may_write(name)
        there = name in self.server.repositories
        if not there:
            made = self.server.repositories[name] = Repository(private=asked.get("visibility") == "private")
            made.commit("main", {".gitattributes": (b"*.safetensors filter=lfs\n", False)}, "initial commit")
        self._json({"url": f"{self.server.url}/{name}"}, 409 if there else 200)

    def info(self, name: str, revision: str | None = None) -> None:
        repository, commit = self._at(name, revision or "main")
        files = [{"rfilename": file} for file in repository.commits[commit]]
        self._json({"id": name, "sha": commit, "private": repository.private, "siblings": files, "tags": []})

    def branch(self, name: str, branch: str, body: bytes) -> None:
        self._may_write(name)
        repository, commit = self._at(name)
        if branch in repository.branches:
            raise Answer(409, "Reference already exists")
        repository.branches[branch] = commit
        self._json({})

    def preupload(self, name: str, revision: str, body: bytes) -> None:
        self._may_write(name)
        repository, commit = self._at(name, revision)
        answers = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(".safetensors")
            there = repository.commits[commit].get(file["path"])
            oid = None
            if there is not None:
                data, stored_large = there
                blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
                oid = hashlib.sha256(data).hexdigest() if stored_large else blob
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def validate(self, body: bytes) -> None:
        try:
            problems = metadata_problems(json.loads(body)["content"])
        except (ValueError, yaml.YAMLError) as error:
            problems = [str(error)]
        self._json({"errors": [{"message": text} for text in problems]}, 400 if problems else 200)

    def batch(self, name: str, body: bytes) -> None:
        self._may_write(name)
        objects = []
        for each in json.loads(body)["objects"]:
            actions = {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}}
            objects.append(each if each["oid"] in self.server.stored else {**each, "actions": actions})
        self._json({"transfer": "basic", "objects": objects})

    def put(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Answer(400, "the bytes are not those of that name")
        self.server.stored[oid] = body
        self._send(b"")

    def commit(self, name: str, branch: str, body: bytes) -> None:
        self._may_write(name)
        repository, commit = self._at(name, branch)
        files, message = dict(repository.commits[commit]), ""
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"]), False
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]], True
            else:
                assert entry["key"] == "deletedFile"
                del files[value["path"]]
        made = repository.commit(branch, files, message)
        self._json({"commitUrl": f"{self.server.url}/{name}/commit/{made}", "commitOid": made})

    def tree(self, name: str, revision: str) -> None:
        repository, commit = self._at(name, revision)
        entries = []
        for path, (data, large) in repository.commits[commit].items():
            stored = {"oid": _etag(data), "size": len(data)}
            pointer = {"lfs": {**stored, "pointerSize": 1}} if large else {}
            entries.append({"type": "file", "path": path, **stored, **pointer})
        self._json(entries)

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository, commit = self._at(name, revision)
        if path not in repository.commits[commit]:
            raise Answer(404, f"no {path}", "EntryNotFound")
        data, large = repository.commits[commit][path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_etag(data)}"'}
        if large:
            headers |= {"X-Linked-Etag": f'"{_etag(data)}"', "X-Linked-Size": str(len(data))}
        self._send(data, 200, headers)


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def metadata_problems(card: str) -> list[str]:
    """What the hub would refuse of a card's metadata, as its documentation tells the rules."""
    if not card.startswith("---\n"):
        return ["no metadata"]
    data = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))
    if data is None:
        return []
    problems = [] if isinstance(data, dict) else ["metadata are no object"]
    bases = data.get("base_model")
    for base in bases if isinstance(bases, list) else [] if bases is None else [bases]:
        if not isinstance(base, str) or not HUB_ID.fullmatch(base):
            problems.append(f'"base_model" with value {base!r} is not valid')
    if data.get("base_model_relation") not in (None, *RELATIONS):
        problems.append('"base_model_relation" must be one of ' + ", ".join(RELATIONS))
    if not isinstance(data.get("license", ""), str):
        problems.append('"license" must be a string')
    if data.get("license") == "other" and not data.get("license_name"):
        problems.append('"license_name" is missing')
    for key in ("tags", "datasets"):
        if not all(isinstance(each, str) for each in data.get(key) or ()):
            problems.append(f'"{key}" must be strings')
    for model in data.get("model-index") or ():
        for result in model["results"]:
            for part, needed in {"task": ("type",), "dataset": ("type", "name")}.items():
                problems += [f"{part}.{key} is missing" for key in needed if not result.get(part, {}).get(key)]
            problems += ["a metric has no value" for metric in result["metrics"] if metric.get("value") is None]
    return problems


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: dict[str, Any] = {
    "POST /api/repos/create": Handler.create,
    "POST /api/validate-yaml": Handler.validate,
    f"(?:GET|HEAD) /api/models/{NAME}": Handler.info,
    f"(?:GET|HEAD) /api/models/{NAME}/revision/(.+)": Handler.info,
    f"GET /api/models/{NAME}/tree/([^/]+)": Handler.tree,
    f"POST /api/models/{NAME}/branch/(.+)": Handler.branch,
    f"POST /api/models/{NAME}/preupload/(.+)": Handler.preupload,
    f"POST /api/models/{NAME}/commit/(.+)": Handler.commit,
    rf"POST /{NAME}\.git/info/lfs/objects/batch": Handler.batch,
    "PUT /lfs/(.+)": Handler.put,
    f"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)": Handler.resolve,
}
