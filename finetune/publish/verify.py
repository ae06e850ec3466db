"""Load a pushed model from the Hub at its commit, as a user would. Only small files are downloaded."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from finetune.errors import GateRefused
from finetune.hub.client import Kind
from finetune.hub.errors import retried, sentences

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

SMALL = ["*.json", "*.jinja", "*.txt", "tokenizer.model", "Modelfile"]
WEIGHT_MAPS = ["*.index.json"]
PROBE = [{"role": "user", "content": "What is 12 + 30?\nSay why."}]


def check_loaded(
    repo_id: str,
    commit: str,
    kind: Kind,
    staged: Path,
    template: Path | None,
    say: Callable[[str], None] = lambda line: None,
    wait: Callable[[float], None] = time.sleep,
) -> list[str]:
    """Load tokenizer, configuration and generation settings from the pushed commit and compare with the trained model.

    Args:
        repo_id: the repository.
        commit: the pushed commit.
        kind: what was pushed; rows have nothing to load here.
        staged: the folder that was pushed.
        template: the render stage's `template` folder: inference.jinja and template.json.
        say: receives a line for each retry.
        wait: sleeps between retries.

    Returns:
        Names of the parts that were loaded and are equal.

    Raises:
        GateRefused: the Hub's files differ from the trained model.
        InputError, FinetuneError: the Hub's refusals, as for a push.
    """
    if kind == "dataset":
        return []
    from huggingface_hub import snapshot_download

    with tempfile.TemporaryDirectory(
        prefix=f"pushed-{os.getpid()}-", dir=staged.parent, ignore_cleanup_errors=True
    ) as cache:
        with sentences("read back", repo_id, "model"):
            options: dict[str, Any] = {"allow_patterns": SMALL, "ignore_patterns": WEIGHT_MAPS}
            pulled = Path(
                retried(lambda: snapshot_download(repo_id, revision=commit, cache_dir=cache, **options), say, wait)
            )
        try:
            differences = list(_differences(kind, pulled, staged, template))
        except (OSError, ValueError, KeyError, TypeError) as error:  # raised by transformers for unreadable files
            words = str(error).strip().splitlines() or [type(error).__name__]
            differences = [f"it does not load ({words[0][:200]})"]
    if differences:
        raise GateRefused(
            f"{repo_id} at {commit[:12]} differs from the trained model: {'; '.join(differences)}; do not use that "
            "commit, check the repository, and push again"
        )
    if kind == "gguf":
        return ["Modelfile"]
    return ["tokenizer", "chat template", "config", *(["generation config"] if kind != "adapter" else [])]


def _differences(kind: Kind, pulled: Path, staged: Path, template: Path | None) -> Iterator[str]:
    if kind == "gguf":
        if (pulled / "Modelfile").read_bytes() != (staged / "Modelfile").read_bytes():
            yield "the Modelfile is another"
        return
    facts = json.loads((template / "template.json").read_text(encoding="utf-8")) if template else {}
    trained = (template / "inference.jinja").read_text(encoding="utf-8") if template else None
    yield from _tokenizer(pulled, staged, facts, trained)
    if kind != "adapter":
        yield from _config(pulled, staged, facts)
    else:
        yield from _adapter_config(pulled, staged, facts)


def _tokenizer(pulled: Path, staged: Path, facts: Mapping[str, Any], trained: str | None) -> Iterator[str]:
    from transformers import AutoTokenizer

    from finetune.tokenization.chat_template import default_template

    there, here = (AutoTokenizer.from_pretrained(p, local_files_only=True) for p in (pulled, staged))
    if trained is not None and default_template(there) != trained:
        yield "the chat template is another"
        return
    if facts and there.pad_token != facts["pad_token"]:
        yield f"the pad token is {there.pad_token!r}, trained with {facts['pad_token']!r}"
    if there.get_vocab() != here.get_vocab() or there.special_tokens_map != here.special_tokens_map:
        yield "the vocabulary or its special tokens are others"
    elif _probe(there) != _probe(here):
        yield "the tokenizer writes a question in other tokens"


def _probe(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return a question's tokens with the template, or without it if the template refuses a single question."""
    from jinja2 import TemplateError

    from finetune.tokenization.template_sandbox import RenderingTooLong, limited

    if tokenizer.chat_template is not None:
        try:
            with limited(len(PROBE)):
                encoding = tokenizer.apply_chat_template(PROBE, add_generation_prompt=True, return_dict=True)
            return list(cast("BatchEncoding", encoding)["input_ids"])
        except (TemplateError, RenderingTooLong):
            pass
    return list(tokenizer(PROBE[0]["content"])["input_ids"])


def _config(pulled: Path, staged: Path, facts: Mapping[str, Any]) -> Iterator[str]:
    from transformers import GenerationConfig

    there, here = (_settings(p) for p in (pulled, staged))
    if {**there, "_name_or_path": ""} != {**here, "_name_or_path": ""}:  # differs by the folder read
        yield "config.json is another"
    every = [GenerationConfig.from_pretrained(p, local_files_only=True).eos_token_id for p in (pulled, staged)]
    actual, pushed = (sorted(e) if isinstance(e, list) else [] if e is None else [e] for e in every)
    if facts and (
        actual != pushed or not set(actual) >= set(facts["terminators"])
    ):  # beside them the base's own others
        yield f"answers end at tokens {actual}, trained to end at {sorted(facts['terminators'])}"


def _settings(folder: Path) -> dict[str, Any]:
    """Return config.json as loaded by transformers; as plain JSON if it needs a custom class of the repository."""
    from transformers import AutoConfig

    written: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "auto_map" in written:
        return written
    read: dict[str, Any] = AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
    return read


def _adapter_config(pulled: Path, staged: Path, facts: Mapping[str, Any]) -> Iterator[str]:
    from peft import PeftConfig

    there, here = (PeftConfig.from_pretrained(str(p)) for p in (pulled, staged))
    if there.to_dict() != here.to_dict():
        yield "adapter_config.json is another"
    written = json.loads((pulled / "template" / "template.json").read_text(encoding="utf-8")) if facts else {}
    if facts and sorted(written["terminators"]) != sorted(facts["terminators"]):
        yield f"answers end at tokens {written['terminators']}, trained to end at {facts['terminators']}"
