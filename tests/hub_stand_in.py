"""A stand-in for the Hugging Face hub: the requests that huggingface_hub makes of it, as the hub answers them, and its troubles on demand.

It answers what huggingface_hub asks: `/api/models/ID/revision/REV`, `/api/models/ID/tree/REV`, and `/ID/resolve/REV/FILE` with `X-Repo-Commit`
and `ETag`; large files are redirected to another path with `X-Linked-Etag` (their SHA-256) and `X-Linked-Size`, as the hub does.
"""

import hashlib
import http.server
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants
from web_server import serve

PAGE = 7  # entries of a listing on one page


@dataclass
class Hub:
    """Repositories, and what goes wrong.

    Attributes:
        commits: repository -> commit -> file -> content.
        refs: repository -> branch or tag -> commit.
        locked: repository -> the error code with which it is refused: 401 (unless asked with the token "right"), 403 (gated) or 500.
        requests: (method, path, Range) of all requests so far, in order.
        tokens: paths that were asked for with a token.
        before: called before each request is answered, as someone who pushes meanwhile.
        cut: a file of this name is broken off after so many bytes, so many times: name -> [bytes, times].
        lies: file name -> content that is sent in its place.
        sizes: file name -> size that is claimed for it.
        names: file names that are added to every listing.
        url: where it listens.
    """

    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    locked: dict[str, int] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    before: Callable[[], None] | None = None
    cut: dict[str, list[int]] = field(default_factory=dict)
    lies: dict[str, bytes] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    url: str = ""

    def push(self, repo: str, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Commit these files as all there is, and let the branch point there; returns the commit."""
        text = repr(sorted((name, git_sha1(data)) for name, data in files.items())) + str(len(self.commits.get(repo, {})))
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits.setdefault(repo, {})[commit] = dict(files)
        self.refs.setdefault(repo, {})[branch] = commit
        return commit

    def downloads(self) -> list[str]:
        """Names of the files that were fetched, in order."""
        fetched = [re.fullmatch(r"/cdn/\w+/(.+)|/[^/]+/[^/]+/resolve/\w+/(.+)", path) for method, path, _ in self.requests if method == "GET"]
        return [match[1] or match[2] for match in fetched if match is not None]


def files_below(folder: Path) -> dict[str, bytes]:
    """The files of a folder by relative name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def git_sha1(data: bytes) -> str:
    """The name that git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def use_hub(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub, in this process, ask this hub and keep what it fetches in `cache`, without waiting between tries."""
    changed = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "DOWNLOAD_CHUNK_SIZE": 256,
        "HF_HUB_OFFLINE": False,
    }
    for name, value in changed.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(time, "sleep", lambda _: None)


@contextmanager
def hub_stand_in() -> Iterator[Hub]:
    """A hub that answers for the time of a `with` block."""
    hub = Hub()
    with serve(_handler(hub)) as url:
        hub.url = url
        yield hub


def _large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".ckpt"))


def _handler(hub: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            self.answer()

        def answer(self):
            if hub.before is not None:
                hub.before()
            parts = urlsplit(self.path)
            path = unquote(parts.path)
            hub.requests.append((self.command, path, self.headers.get("Range", "")))
            if "Authorization" in self.headers:
                hub.tokens.append(path)
            info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
            tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            cdn = re.fullmatch(r"/cdn/(\w{64})/(.+)", path)
            if cdn:
                self.content(cdn[2], self.by_sha256(cdn[1]), {})
            elif tree and self.admitted(tree[1]):
                self.listing(*tree.groups(), parts.query)
            elif info and self.admitted(info[1]):
                commit = self.commit(info[1], info[2] or "main")
                if commit is not None:
                    names = [{"rfilename": name} for name in hub.commits[info[1]][commit]]
                    self.send(200, json.dumps({"_id": "1", "id": info[1], "sha": commit, "private": False, "tags": [], "siblings": names}).encode())
            elif file and self.admitted(file[1]):
                self.file(*file.groups())
            elif not (tree or info or file):
                self.send(404, b"", {"X-Error-Code": "RepoNotFound"})

        def admitted(self, repo: str) -> bool:
            code = hub.locked.get(repo)
            if repo not in hub.commits:
                self.send(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."})
            elif code == 401 and self.headers.get("Authorization") != "Bearer right":
                self.send(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted."})
            elif code == 403:
                self.send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "You are not in the authorized list."})
            elif code == 500:
                self.send(500, b"")
            else:
                return True
            return False

        def commit(self, repo: str, revision: str) -> str | None:
            commit = hub.refs[repo].get(revision, revision)
            if commit in hub.commits[repo]:
                return commit
            self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return None

        def listing(self, repo: str, revision: str, query: str):
            commit = self.commit(repo, revision)
            if commit is None:
                return
            entries: list[dict[str, object]] = []
            for name, data in [*sorted(hub.commits[repo][commit].items()), *((name, b"{}") for name in hub.names)]:
                size = hub.sizes.get(name, len(data))
                entry = {"type": "file", "oid": git_sha1(data), "size": size, "path": name}
                if _large(name):
                    entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 130}
                entries.append(entry)
            cursor = int((re.search(r"cursor=(\d+)", query) or [0, 0])[1])
            more = {"Link": f'<{hub.url}/api/models/{repo}/tree/{revision}?recursive=True&cursor={cursor + PAGE}>; rel="next"'}
            self.send(200, json.dumps(entries[cursor : cursor + PAGE]).encode(), more if cursor + PAGE < len(entries) else {})

        def file(self, repo: str, revision: str, name: str):
            commit = self.commit(repo, revision)
            if commit is None:
                return
            data = hub.commits[repo][commit].get(name)
            if data is None:
                self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            elif _large(name):
                digest = hashlib.sha256(data).hexdigest()
                elsewhere = hub.url.replace("127.0.0.1", "localhost")  # the hub redirects to another host, which gets no token
                linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(hub.sizes.get(name, len(data)))}
                self.send(302, b"", {"X-Repo-Commit": commit, "Location": f"{elsewhere}/cdn/{digest}/{name}", **linked})
            else:
                self.content(name, data, {"X-Repo-Commit": commit, "ETag": f'"{git_sha1(data)}"'})

        def by_sha256(self, digest: str) -> bytes:
            contents = (data for commits in hub.commits.values() for files in commits.values() for data in files.values())
            return next(data for data in contents if hashlib.sha256(data).hexdigest() == digest)

        def content(self, name: str, data: bytes, headers: dict[str, str]):
            data = hub.lies.get(name, data)
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(asked[1]) if asked else 0
            if asked:
                headers |= {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            end, left = len(data), hub.cut.get(name, [0, 0])
            if self.command == "GET" and left[1] > 0:
                left[1] -= 1
                end = min(end, start + left[0])
            self.send(206 if asked else 200, data[start:], headers, sent=end - start)

        def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, sent: int | None = None):
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[:sent])

        def log_message(self, format: str, *args: object):
            pass

    return Handler
