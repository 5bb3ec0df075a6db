"""A hub on 127.0.0.1 for downloads, which can be told to misbehave."""

from __future__ import annotations

import hashlib
import io
import json
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import torch
from safetensors.torch import save

from kimia_infer.models.kimi_audio.checkpoint import MODEL, SPEECH_TOKENIZER

LARGE = (".safetensors", ".pt")
SHARED = b'{"feature_size": 128}'  # one content under two names


def tensors(seed: int, size: int = 40_000) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    return save({"weight": torch.randn(size, generator=generator)})


def pickle_archive(text: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        # Of a fixed date, so that it is the same whenever it is made.
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), text)
    return buffer.getvalue()


def published_files() -> dict[str, dict[str, bytes]]:
    """Both repositories in small, with the irregular shard names and unneeded files."""
    index = {"weight_map": {"a": "model-1-of-35.safetensors", "b": "model-36-of-36.safetensors"}}
    model = {
        "README.md": b"not needed",
        "modeling_moonshot_kimia.py": b"raise SystemExit",
        "config.json": b"{}",
        "generation_config.json": b"{ }",
        "model-1-of-35.safetensors": tensors(1),
        "model-36-of-36.safetensors": tensors(2),
        "model.safetensors.index.json": json.dumps(index).encode(),
        "special_tokens_map.json": b"[]",
        "tiktoken.model": b"IQ== 0\n",
        "tokenizer_config.json": b"{  }",
        "whisper-large-v3/config.json": b"{   }",
        "whisper-large-v3/model.safetensors": tensors(3),
        "whisper-large-v3/preprocessor_config.json": SHARED,
        "whisper-large-v3/vocab.json": b"not needed",
        "audio_detokenizer/config.yaml": b"depth: 1\n",
        "audio_detokenizer/model.pt": pickle_archive("detokenizer"),
        "vocoder/config.json": b"{    }",
        "vocoder/model.pt": pickle_archive("vocoder"),
    }
    tokenizer = {
        "LICENSE": b"not needed",
        "config.json": b"{     }",
        "model.safetensors": tensors(4),
        "preprocessor_config.json": SHARED,
    }
    return {MODEL.name: model, SPEECH_TOKENIZER.name: tokenizer}


class Hub(ThreadingHTTPServer):
    """The endpoints of the hub that a download uses: model information, file list and content.

    As on the real one, large files are redirected to another host, and a renamed repository
    to its new name.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.store = f"http://localhost:{self.server_port}"
        self.files = published_files()
        self.revisions = {
            MODEL.name: MODEL.revision,
            SPEECH_TOKENIZER.name: SPEECH_TOKENIZER.revision,
        }
        self.renamed = {"new-owner/tokenizer": SPEECH_TOKENIZER.name}
        self.requests: list[str] = []  # every path asked for
        self.served: list[tuple[str, str | None]] = []  # file and range of content that was sent
        self.keys: dict[str, set[str | None]] = {"127.0.0.1": set(), "localhost": set()}
        self.cut: dict[str, list[int]] = {}  # file -> bytes to send before hanging up, per request
        self.stall: dict[str, int] = {}  # file -> bytes to send before falling silent
        self.released = threading.Event()
        self.changed: dict[str, bytes] = {}  # file -> content sent instead of the listed one
        self.refusal: tuple[int, str] | None = None  # status and error code of every answer

    def ranges(self, name: str) -> list[str | None]:
        return [wanted for served, wanted in self.served if served == name]


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, *headers: tuple[str, str], length: int = 0) -> None:
        self.send_response(status)
        for header in (*headers, ("Content-Length", str(length))):
            self.send_header(*header)
        self.end_headers()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server, urlsplit(self.path).path
        hub.requests.append(path)
        host = self.headers["Host"].partition(":")[0]
        hub.keys[host].add(self.headers.get("Authorization"))
        api = path.startswith("/api/models/")
        if path.startswith("/api/") and not api:  # the library's other interests
            return self.answer(404)
        owner, name, kind, revision, *rest = path.removeprefix("/api/models").strip("/").split("/")
        repository = hub.renamed.get(f"{owner}/{name}", f"{owner}/{name}")
        new = {old: new for new, old in hub.renamed.items()}.get(f"{owner}/{name}")
        file = "/".join(rest)
        if hub.refusal:
            self.answer(hub.refusal[0], ("X-Error-Code", hub.refusal[1]))
        elif repository not in hub.files:
            self.answer(401, ("X-Error-Code", "RepoNotFound"))
        elif revision not in (hub.revisions[repository], "main"):
            self.answer(404, ("X-Error-Code", "RevisionNotFound"))
        elif new:
            self.answer(307, ("Location", self.path.replace(f"{owner}/{name}", new)))
        elif api:
            self.send_json({"revision": self.information, "tree": self.tree}[kind](repository))
        elif kind == "resolve" and (self.command == "HEAD" or file.endswith(LARGE)):
            content, commit = hub.files[repository][file], hub.revisions[repository]
            headers = [("X-Repo-Commit", commit), ("ETag", f'"{checksum(file, content)}"')]
            headers.append(("X-Linked-Size", str(len(content))))
            if file.endswith(LARGE):
                where = f"{hub.store}/{repository}/large/{revision}/{file}"
                headers += [("X-Linked-Etag", headers[1][1]), ("Location", where)]
            self.answer(302 if file.endswith(LARGE) else 200, *headers)
        else:
            assert (kind == "large") == (host == "localhost")
            self.content(repository, file)

    def send_json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.answer(200, ("Content-Type", "application/json"), length=len(body))
        self.wfile.write(body)

    def tree(self, repository: str) -> list[dict]:
        entries = []
        for name, content in self.server.files[repository].items():
            entry = {"type": "file", "path": name, "size": len(content), "oid": blob_id(content)}
            if name.endswith(LARGE):
                large = {"oid": checksum(name, content), "size": len(content), "pointerSize": 130}
                entry["lfs"] = large
            entries.append(entry)
        return entries

    def information(self, repository: str) -> dict:
        siblings = []
        for name, content in self.server.files[repository].items():
            entry = {"rfilename": name, "size": len(content), "blobId": blob_id(content)}
            if name.endswith(LARGE):
                large = {"sha256": checksum(name, content), "size": len(content)}
                entry["lfs"] = large | {"pointerSize": 130}
            siblings.append(entry)
        return {"id": repository, "sha": self.server.revisions[repository], "siblings": siblings}

    def content(self, repository: str, name: str) -> None:
        hub = self.server
        body = hub.changed.get(name, hub.files[repository][name])
        wanted = self.headers.get("Range")
        path = name if repository == MODEL.name else f"{repository}/{name}"
        hub.served.append((path, wanted))
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        body = body[start:]
        self.answer(206 if wanted else 200, length=len(body))
        if name in hub.stall:
            self.wfile.write(body[: hub.stall[name]])
            hub.released.wait()
            self.close_connection = True
            return
        if hub.cut.get(name):
            body = body[: hub.cut[name].pop(0)]
            self.close_connection = True
        self.wfile.write(body)


def checksum(name: str, content: bytes) -> str:
    """As the hub gives it: SHA-256 of a large file, the git blob id of a small one."""
    return hashlib.sha256(content).hexdigest() if name.endswith(LARGE) else blob_id(content)


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
