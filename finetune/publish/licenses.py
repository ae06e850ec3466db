"""Licences of base and data on the Hub, and their consequences for a push.

This is not legal advice: a licence's name is compared with known restrictive names, so that the user checks the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from finetune.errors import FinetuneError
from finetune.hub.client import Kind, RepoType
from finetune.hub.errors import sentences

if TYPE_CHECKING:
    from huggingface_hub import DatasetInfo, ModelInfo

NO_DERIVATIVES = re.compile(r"(^|-)nd(-|$)")
NO_COMMERCE = re.compile(r"(^|-)nc(-|$)|non-?commercial|research-only")
COMMUNITY = {  # prefix of a name → requirement of its text
    "llama2": "a community licence: its text and notice go along, and its acceptable-use policy binds",
    "llama3": "a community licence: a model made of it is to carry Llama in front of its name, with its notice",
    "llama4": "a community licence: a model made of it is to carry Llama in front of its name, with its notice",
    "gemma": "terms of use: their text and the restrictions in them go along",
}


def read_licences(asked: Mapping[str, tuple[RepoType, str, str | None]], say: Callable[[str], None]) -> dict[str, str]:
    """Return label → licence from the Hub's metadata for each (type, id, revision); unreadable ones are absent."""
    from huggingface_hub import HfApi, constants

    if constants.is_offline_mode():
        say("licences: not read from the Hub, HF_HUB_OFFLINE is set")
        return {}
    api, licences = HfApi(), dict[str, str]()
    for label, (repo_type, repo_id, revision) in asked.items():
        try:
            with sentences("read the licence of", repo_id, repo_type):
                info: Any = api.repo_info(repo_id, repo_type=repo_type, revision=revision)
        except FinetuneError as error:
            say(f"licences: {error}")
            continue
        if name := _name(info):
            licences[label] = name
    return licences


def _name(info: ModelInfo | DatasetInfo) -> str:
    """Return the licence in a repository's metadata, "other (NAME)" for a custom one, "" for none."""
    data = info.card_data.to_dict() if info.card_data else {}
    stated = data.get("license") or [t.removeprefix("license:") for t in info.tags or () if t.startswith("license:")]
    name = ", ".join(map(str, stated)) if isinstance(stated, list) else str(stated)
    own = data.get("license_name")
    return f"{name} ({own})" if own and name else name


def judge(
    labels: Iterable[str], licences: Mapping[str, str], own: str | None, kinds: Iterable[Kind]
) -> tuple[list[str], str]:
    """Return notes for the user before a push, and the reason for refusing it ("" if it is allowed).

    Args:
        labels: "model ID" or "dataset ID" of everything the push derives from.
        licences: label → licence.
        own: the recipe's publish.license.
        kinds: what is pushed; rows alone do not derive from the base.
    """
    unset = "licence: publish.license is not set; without a licence others may not use the published model"
    notes = [] if own else [unset]
    refusal = ""
    rows_only = set(kinds) == {"dataset"}
    for label in labels:
        if rows_only and label.startswith("model "):
            continue
        name = licences.get(label, "")
        lower = name.lower()
        if NO_DERIVATIVES.search(lower):
            words = f"{label} is under {name}, which forbids publishing derived works"
            if not own:
                refusal = refusal or (
                    f"licence: {words}; ask its owner, and set publish.license to the licence you may give"
                )
            notes.append(f"licence: {words}; publish.license is {own}" if own else f"licence: {words}")
        if NO_COMMERCE.search(lower):
            notes.append(f"licence: {label} is under {name}, which forbids commercial use, also of derived works")
        community = next((words for begin, words in COMMUNITY.items() if lower.startswith(begin)), "")
        if community:
            notes.append(f"licence: {label} is under {name}, {community}")
        if not name or lower.split(" ")[0] in ("other", "unknown"):
            notes.append(f"licence: the licence of {label} is {name or 'unknown'}; read it before you publish")
    return notes, refusal
