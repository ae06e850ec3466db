"""Resolve `dedup.embedding` (`lsa`, a model on the Hub or a folder) to its part of a stage's key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from finetune.errors import InputError
from finetune.recipe import STATIC

LSA = "lsa"


def model_fingerprint(name: str, folder: Path | None) -> Mapping[str, object]:
    """Return the digests of a folder's files, or the current commit of a Hub name; LSA depends on the rows only.

    Raises:
        InputError: the folder holds no model, or the Hub knows no such name.
        FinetuneError: the Hub cannot be reached and the cache does not know the name.
    """
    if folder is not None:
        return {"files": _digests(folder)}
    if name == LSA:
        return {}
    from finetune.hub.client import resolve_revision

    return {"revision": resolve_revision(name.removeprefix(STATIC), None, repo_type="model", scratch=None)}


def _digests(folder: Path) -> dict[str, str]:
    """Return the xxh3-128 of every file except hidden ones, by relative path."""
    from finetune.utils.files import file_digest
    from finetune.utils.links import require_model

    if not (folder / "modules.json").is_file() and not (folder / "config.json").is_file():
        raise InputError(
            f"dedup.embedding: {folder} holds no embedding model (no modules.json or config.json); "
            "give the folder of one, a Hub name such as thenlper/gte-large, or lsa"
        )
    require_model(folder, "dedup.embedding")
    digests = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in name.parts):
            digests[name.as_posix()] = file_digest(path)
    return digests
