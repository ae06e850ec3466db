"""The Hugging Face Hub: pin a revision, ask for access, push a folder and prove that it arrived.

A token is read by huggingface_hub alone and never passes through here.
"""

from __future__ import annotations

import hashlib
import io
import re
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from finetune.errors import FinetuneError, InputError
from finetune.hub.errors import LOG_IN, retried, sentences, tokens_page
from finetune.hub.guard import install
from finetune.utils.files import read_json

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

T = TypeVar("T")
RepoType = Literal["model", "dataset"]
Kind = Literal["adapter", "merged", "gguf", "fp8", "w4a16", "nf4", "dataset"]
HF_KINDS: tuple[Kind, ...] = ("fp8", "w4a16", "nf4")  # quantised folders of the export stage

COMMIT = re.compile(r"[0-9a-f]{40}")
WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
# Files that a loader would read from a repository, by the kind of push they belong to.
OWN = {
    "adapter": re.compile(r"adapter_model\.(safetensors|bin)"),
    **dict.fromkeys(("merged", *HF_KINDS), WEIGHTS),
    "gguf": re.compile(r"model-\w+\.gguf"),
    "dataset": re.compile(r"data/(train|eval)\.parquet"),
}
OTHER_ROWS = re.compile(r".+\.(parquet|arrow|jsonl|csv)(\.gz|\.zst)?")  # in a dataset repository


def resolve_revision(
    repo_id: str,
    revision: str | None,
    repo_type: RepoType = "model",
    scratch: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Return the 40-digit commit that `revision` (default: main) of a repository names.

    A commit is returned unchanged, without network. Otherwise the Hub's answer is kept in the refs of the local cache
    (`scratch/hub`, or the default cache), which are used when the Hub cannot be reached.

    Raises:
        InputError: the repository or revision does not exist, or this account may not read it.
        FinetuneError: the Hub cannot be reached and the cache does not know the revision.
    """
    install()  # also for later downloads of this repository by other libraries
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi, constants

    named = revision or "main"
    default = Path(constants.HF_HUB_CACHE)
    caches = [default] if scratch is None else [scratch / "hub", default]
    problem = "HF_HUB_OFFLINE is set"
    if not constants.is_offline_mode():
        try:
            with sentences(f"read revision {named!r} of", repo_id, repo_type):
                api = HfApi()
                info = api.repo_info(repo_id, repo_type=repo_type, revision=revision)
        except InputError:
            raise
        except FinetuneError as error:
            problem = str(error)
        else:
            sha = info.sha or ""
            if not COMMIT.fullmatch(sha):
                raise FinetuneError(f"the Hub named no commit for revision {named!r} of {repo_type} {repo_id}")
            with suppress(OSError):  # if the cache cannot be written, the next run asks the Hub again
                ref = _ref(caches[0], repo_id, repo_type, named)
                ref.parent.mkdir(parents=True, exist_ok=True)
                ref.write_text(sha, encoding="ascii")
            return sha
    for cache in caches:
        ref = _ref(cache, repo_id, repo_type, named)
        if ref.is_file() and COMMIT.fullmatch(sha := ref.read_text(encoding="ascii", errors="replace").strip()):
            say(f"{repo_type} {repo_id}: {problem}; using revision {named!r} as last seen, {sha[:12]}")
            return sha
    raise FinetuneError(
        f"cannot tell which commit revision {named!r} of {repo_type} {repo_id} is: {problem}, and the local cache does "
        "not know it; connect once, or write the 40-digit commit as the revision"
    )


def check_read(repo_id: str, repo_type: RepoType = "model") -> str | None:
    """Check that this account may download a repository; return a note if that could not be checked, else None.

    Raises:
        InputError: it does not exist, is private, or is gated and its terms are not accepted yet.
    """
    from huggingface_hub import HfApi

    return _checked("read", repo_id, repo_type, lambda: HfApi().auth_check(repo_id, repo_type=repo_type))


def read_adapter_files(
    repo_id: str, revision: str | None, scratch: Path
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Read an adapter's configuration and the shapes of its tensors from the Hub, without its weights.

    Raises InputError if the repository holds no adapter in safetensors, FinetuneError if the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, hf_hub_download

    commit = resolve_revision(repo_id, revision, scratch=scratch)
    with sentences("read", repo_id, "model"):
        names = HfApi().list_repo_files(repo_id, revision=commit)
        if missing := [n for n in ("adapter_config.json", "adapter_model.safetensors") if n not in names]:
            raise InputError(f"{repo_id} holds no {missing[0]}; an adapter is a repository that peft has saved")
        config = read_json(
            Path(hf_hub_download(repo_id, "adapter_config.json", revision=commit, cache_dir=scratch / "hub"))
        )
        stored = HfApi().parse_safetensors_file_metadata(repo_id, "adapter_model.safetensors", revision=commit)
    return config, {name: tuple(info.shape) for name, info in stored.tensors.items()}


def check_write(repo_id: str) -> str | None:
    """Check that this account may push to a model repository; return a note if that could not be checked, else None.

    Nothing is created: the token's role and the role in the organisation are read, and the Hub is asked about an
    existing repository.

    Raises:
        InputError: no token, a token for reading only, or no right to write in that namespace.
    """
    return _checked("push to", repo_id, "model", lambda: _require_write(repo_id))


def push_folder(
    folder: Path,
    repo_id: str,
    kind: Kind,
    private: bool = True,
    message: str = "Upload model",
    say: Callable[[str], None] = lambda line: None,
    wait: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Push every file of `folder` to a repository, then compare the Hub's listing with the local files.

    Rows (`kind` dataset) go to a dataset repository, the rest to a model repository, which is created if necessary. No
    commit is made if nothing differs. Weights or rows of an earlier push that this one does not replace are deleted:
    a loader prefers a stale `model.safetensors` to new shards.

    Returns:
        {"repo", "kind", "url", "commit", "new_commit", "private", "removed": [path], "bytes", "files": [{"path",
        "bytes", "sha256" (or "git_sha1" for a file kept in git)}]}.

    Raises:
        InputError: 401, 403, 404; invalid metadata; a public repository instead of a private one; other weights there.
        FinetuneError: 409; 429, 5xx or a dropped connection after bounded retries; a file that differs on the Hub.
    """
    from huggingface_hub import HfApi

    def again(call: Callable[[], T]) -> T:
        return retried(call, say, wait)

    api = HfApi()
    repo_type: RepoType = "dataset" if kind == "dataset" else "model"
    with sentences("push to", repo_id, repo_type):
        again(lambda: api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True))
        info = again(lambda: api.repo_info(repo_id, repo_type=repo_type))
        if private and info.private is False:
            raise InputError(
                f"{repo_id} exists and is public, but publish.private is true: make it private in its settings on the "
                "Hub, write `private: false`, or name another repository"
            )
        stale = _stale_files(folder, kind, repo_id, again(lambda: tree_of(api, repo_id, repo_type, "main")))
        what: dict[str, Any] = {"folder_path": folder, "commit_message": message, "delete_patterns": stale or None}
        commit = again(lambda: api.upload_folder(repo_id=repo_id, repo_type=repo_type, **what))
        listed = again(lambda: tree_of(api, repo_id, repo_type, commit.oid))
    files = _compared(folder, repo_id, commit.oid, listed, stale)
    return {
        "repo": repo_id,
        "kind": kind,
        "url": f"{api.endpoint}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}",
        "commit": commit.oid,
        "new_commit": commit.oid != info.sha,
        "private": bool(info.private),
        "removed": stale,
        "bytes": sum(f["bytes"] for f in files),
        "files": files,
    }


def _ref(cache: Path, repo_id: str, repo_type: RepoType, revision: str) -> Path:
    """Return the file in which huggingface_hub's cache keeps the commit of a revision."""
    return cache / "--".join([f"{repo_type}s", *repo_id.split("/")]) / "refs" / revision


def _checked(action: str, repo_id: str, repo_type: RepoType, check: Callable[[], object]) -> str | None:
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return f"access to {repo_type} {repo_id} could not be checked: HF_HUB_OFFLINE is set"
    try:
        with sentences(action, repo_id, repo_type):
            check()
    except InputError:
        raise
    except FinetuneError as error:
        return f"access could not be checked: {error}"
    return None


def require_token(repo_id: str) -> None:
    """Raise InputError if there is no Hub token to push with; no network."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise InputError(f"cannot push to {repo_id}: no Hub token found; {LOG_IN}")


def _require_write(repo_id: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    require_token(repo_id)
    account = HfApi().whoami()  # the token's role: auth_check knows nothing of a repository that does not exist yet
    namespace = repo_id.split("/")[0] if "/" in repo_id else account["name"]
    token = (account.get("auth") or {}).get("accessToken") or {}
    role, grants = token.get("role"), token.get("fineGrained") or {}
    if role == "read" or (role == "fineGrained" and not _fine_grained_writes(grants, namespace, repo_id)):
        raise InputError(
            f"cannot push to {repo_id}: the Hub token may not write there; give it that at {tokens_page()}"
        )
    if namespace != account["name"]:
        roles = {org["name"]: org.get("roleInOrg") for org in account.get("orgs", [])}
        if namespace not in roles:
            raise InputError(
                f"cannot push to {repo_id}: {account['name']} is not a member of {namespace}; set publish.repo to "
                f"{account['name']}/{repo_id.split('/')[-1]}"
            )
        if roles[namespace] == "read":
            raise InputError(f"cannot push to {repo_id}: {account['name']} may only read in {namespace}")
    try:
        HfApi().auth_check(repo_id, write=True)
    except HfHubHTTPError as error:
        # A missing repository is created by the push; a mirror may lack this endpoint.
        if error.response.status_code != 404:
            raise


def _fine_grained_writes(grants: dict[str, Any], namespace: str, repo_id: str) -> bool:
    """Whether a fine-grained token's scopes name write access to the repository or to its namespace."""
    if "repo.write" in grants.get("global", []):
        return True
    scopes = ((s.get("entity") or {}, s.get("permissions", [])) for s in grants.get("scoped", []))
    return any(e.get("name") in (namespace, repo_id) and "repo.write" in may for e, may in scopes)


def tree_of(api: HfApi, repo_id: str, repo_type: RepoType, revision: str) -> list[RepoFile]:
    """Return every file of a revision, with its size and hash."""
    from huggingface_hub.hf_api import RepoFile

    entries = api.list_repo_tree(repo_id, recursive=True, revision=revision, repo_type=repo_type)
    return [e for e in entries if isinstance(e, RepoFile)]


def _stale_files(folder: Path, kind: Kind, repo_id: str, listed: Iterable[RepoFile]) -> list[str]:
    paths = sorted(f.path for f in listed)
    others = [pattern for name, pattern in OWN.items() if name != kind]
    others += [OTHER_ROWS] if kind == "dataset" else []
    foreign = [p for p in paths if not OWN[kind].fullmatch(p) and any(o.fullmatch(p) for o in others)]
    if foreign:
        raise InputError(
            f"{repo_id} holds {foreign[0]}, which is not part of the {kind} to be pushed; a loader would read both: "
            "set publish.repo to another repository, or delete that file there first"
        )
    return [p for p in paths if OWN[kind].fullmatch(p) and not (folder / p).exists()]


def _compared(
    folder: Path, repo_id: str, commit: str, listed: Iterable[RepoFile], removed: Iterable[str]
) -> list[dict[str, Any]]:
    """Return every local file with the hash that the Hub lists for it. Raises FinetuneError if one differs."""
    remote = {f.path: f for f in listed}
    files = []
    wrong = [f"{name} should be gone" for name in removed if name in remote]
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name, size = path.relative_to(folder).as_posix(), path.stat().st_size
        there = remote.get(name)
        if there is None:
            wrong.append(f"{name} is missing")
            continue
        hashed, expected = announced(there)
        digest = hub_digest(path, size, hashed)
        if there.size != size or digest != expected:
            wrong.append(f"{name} has {size} bytes, {hashed} {digest[:12]}; there {there.size}, {expected[:12]}")
        files.append({"path": name, "bytes": size, hashed: digest})
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise FinetuneError(
            f"{repo_id} at {commit[:12]} differs from the local files: {'; '.join(wrong[:3])}{more}; do not use that "
            "commit, and push again"
        )
    return files


def announced(file: RepoFile) -> tuple[str, str]:
    """Return the kind of hash, as `hub_digest` takes it, and the hash that the Hub lists for a file."""
    return ("sha256", file.lfs.sha256) if file.lfs else ("git_sha1", file.blob_id)


def hub_digest(content: Path | bytes, size: int, kind: str) -> str:
    """Return the sha256 of a file or of bytes, or the git blob id: sha1 over `blob SIZE NUL CONTENT`."""
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
