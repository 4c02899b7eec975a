"""What the loopback hub knows: users, repositories, commits, blobs. No sockets here."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field

NO_COMMIT = "0" * 40
GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


class Refusal(Exception):
    """An answer that is an error, as the Hub words it."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


@dataclass(frozen=True)
class User:
    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()


@dataclass(frozen=True)
class File:
    """A file of a commit: git blobs carry their bytes, LFS files only their address."""

    size: int
    oid: str  # git sha1 of the blob, or of the pointer
    data: bytes | None = None
    sha256: str | None = None  # of an LFS file

    @classmethod
    def regular(cls, data: bytes) -> File:
        return cls(len(data), git_sha1(data), data)

    @classmethod
    def lfs(cls, sha256: str, size: int) -> File:
        return cls(size, git_sha1(pointer(sha256, size)), None, sha256)


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    files: dict[str, File]
    author: str = "ana"


@dataclass
class Repo:
    name: str  # ns/name
    private: bool = False
    gated: bool = False
    disabled: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: list[str] = field(default_factory=list)

    def head(self, branch: str = "main") -> Commit:
        return self.commits[self.branches[branch]]

    def find(self, revision: str) -> Commit:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def add(self, branch: str, files: dict[str, File], title: str, author: str = "ana") -> Commit:
        parent = self.branches.get(branch)
        tree = "".join(f"{path} {f.oid}\n" for path, f in sorted(files.items()))
        sha = hashlib.sha1(f"{parent}\n{title}\n{len(self.commits)}\n{tree}".encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, title, files, author)
        self.branches[branch] = sha
        return self.commits[sha]


class State:
    """Everything the hub remembers, and the one lock around it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.users = {"hf_owner": User("ana"), "hf_reader": User("ana", "read"), "hf_other": User("ben")}
        self.repos: dict[str, Repo] = {}
        self.renamed: dict[str, str] = {}
        self.lfs: dict[str, bytes] = {}  # sha256 -> content
        self.parts: dict[str, dict[int, bytes]] = {}
        self.xet_hashes: dict[str, str] = {}  # sha256 -> Xet hash

    def create(self, name: str, *, private: bool = False, gated: bool = False, files: dict[str, bytes] | None = None):
        """A repository with its first commit, as the Hub makes it, and further files where they are given."""
        repo = self.repos[name] = Repo(name, private, gated)
        start = {".gitattributes": File.regular(GITATTRIBUTES)}
        repo.add("main", start, "initial commit")
        if files:
            repo.add("main", start | {path: self.stored(path, data) for path, data in files.items()}, "Upload")
        return repo

    def stored(self, path: str, data: bytes) -> File:
        if not is_lfs(path, len(data)):
            return File.regular(data)
        sha256 = hashlib.sha256(data).hexdigest()
        self.lfs[sha256] = data
        return File.lfs(sha256, len(data))

    def put(self, name: str, files: dict[str, bytes | None], branch: str = "main", title: str = "Edit") -> Commit:
        """A commit by somebody else; None deletes."""
        repo = self.repos[name]
        tree = dict(repo.head(branch).files)
        for path, data in files.items():
            tree.pop(path, None)
            if data is not None:
                tree[path] = self.stored(path, data)
        return repo.add(branch, tree, title, "ben")

    def content(self, name: str, path: str, revision: str = "main") -> bytes:
        file = self.repos[name].find(revision).files[path]
        return self.lfs[file.sha256] if file.sha256 else file.data


def is_lfs(path: str, size: int) -> bool:
    return path.endswith((".safetensors", ".bin", ".pkl", ".png", ".sig")) or size > 10_000_000


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
