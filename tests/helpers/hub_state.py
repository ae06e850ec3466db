"""What the loopback Hub of hub_server.py holds: repositories, LFS objects, faults to inject, requests it was sent."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

TOKEN = "hf_" + "Loopback" * 4  # looks like a token, opens nothing
LFS = (".safetensors", ".bin", ".gguf", ".model", ".parquet", ".npy", "tokenizer.json")


def git_oid(content: bytes) -> str:
    """The git blob id of `content`: sha1 over `blob SIZE NUL CONTENT`."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    """The id that LFS gives `content`."""
    return hashlib.sha256(content).hexdigest()


def is_lfs(path: str) -> bool:
    """Whether this Hub keeps `path` in LFS."""
    return path.endswith(LFS)


@dataclass
class Fault:
    """What one endpoint does wrong for the next `times` matching requests."""

    method: str
    pattern: str  # searched in the path
    status: int | None = None  # answer with this status
    drop: str | None = None  # close "during" its body, "before" or "after" it has taken effect, without an answer
    times: int = 1
    code: str = ""  # X-Error-Code
    message: str = "injected"
    page: bool = False  # answer with HTML, as a proxy in between would
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Repo:
    """One repository: `commits` maps a commit's id to its files; the last is main."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    @property
    def head(self) -> str:
        """The newest commit's id."""
        return list(self.commits)[-1]

    def commit(self, files: dict[str, bytes]) -> str:
        """Add a commit that holds exactly `files`."""
        listing = json.dumps([len(self.commits), sorted((p, git_oid(c)) for p, c in files.items())])
        sha = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[sha] = files
        return sha


@dataclass
class LoopbackHub:
    """The Hub's state; one per test. Nobody's token is ever stored, only whether a request had one."""

    url: str = ""
    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    corrupt: set[str] = field(default_factory=set)  # paths whose content this Hub damages when it is committed
    served: dict[str, bytes] = field(default_factory=dict)  # paths for which downloads get something else
    multipart_bytes: int | None = None  # larger LFS objects go up in parts of this size
    token_role: str = "write"
    fine_grained: dict[str, Any] | None = None
    orgs: dict[str, str] = field(default_factory=lambda: {"lab": "write", "reader": "read"})
    requests: list[tuple[str, str, bool]] = field(default_factory=list)  # method, path, had a token
    lock: Lock = field(default_factory=Lock)

    def plant(self, repo_id: str, files: Mapping[str, str | bytes], repo_type: str = "model", **how: Any) -> str:
        """Put a repository (or its next commit) on the Hub; `how` is private, gated. Returns the commit."""
        repo = self.repos.setdefault((repo_type, repo_id), Repo(**how))
        return repo.commit({p: c.encode() if isinstance(c, str) else c for p, c in files.items()})

    def fail(self, method: str, pattern: str, **how: Any) -> None:
        """Let the next matching requests fail."""
        self.faults.append(Fault(method, pattern, **how))

    def asked(self, method: str, pattern: str) -> int:
        """How many requests of `method` had `pattern` in their path."""
        return sum(m == method and bool(re.search(pattern, p)) for m, p, _ in self.requests)

    def files(self, repo_id: str, repo_type: str = "model") -> dict[str, bytes]:
        """The files of the newest commit."""
        repo = self.repos[repo_type, repo_id]
        return repo.commits[repo.head]

    def env(self, home: Path, token: bool = True) -> dict[str, str]:
        """What a subprocess needs in its environment to talk to this Hub and keep to `home`."""
        names = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK")
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", **dict.fromkeys(names, "1")}
        return own | ({"HF_TOKEN": TOKEN} if token else {})
