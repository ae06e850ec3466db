"""Files of each kind of push, checked for forbidden content before anything is sent."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.errors import InputError
from finetune.hub.client import HF_KINDS, Kind
from finetune.utils.files import read_json
from finetune.utils.secrets import find_secrets

CARD, MODELFILE = "README.md", "Modelfile"
NEEDED: Mapping[Kind, tuple[str, ...]] = {
    "adapter": ("base", "train"),
    "merged": ("base", "merge"),
    **dict.fromkeys(("gguf", *HF_KINDS), ("base", "merge", "export")),
    "dataset": ("base", "render"),  # render is finished, so the last of the stages below is too
}
ROW_STAGES = ("split", "sample", "decontaminate", "dedup", "filter", "ingest")  # the last that ran has the rows
SCANNED = (".json", ".jinja", ".txt", ".md", ".jsonl")
SCANNED_BYTES = 4_000_000  # a larger text file is a vocabulary
_LOCAL_PATH = re.compile(r"(/|~|\.{1,2}[/\\]|[A-Za-z]:[/\\]|file:).*", re.DOTALL)


def stages_read(kinds: list[Kind], folders: Mapping[str, Path]) -> set[str]:
    """The stages whose files a push of `kinds` or its cards are made of, those of `folders`."""
    read = {"base", "render", "train", "align", *(stage for kind in kinds for stage in NEEDED[kind])}
    rows = [stage for stage in ROW_STAGES if stage in folders][:1] if "dataset" in kinds else []
    return {stage for stage in [*read, *rows] if stage in folders}


def collect(kind: Kind, folders: Mapping[str, Path], made: Path) -> tuple[dict[str, Path], dict[str, dict[str, Any]]]:
    """Return path in the repository → file, without the card; and for rows split → {"rows", "columns"}.

    `made` is a folder for files written only for the push. Raises InputError if a stage is not finished, or if the
    files contain a local path, a credential, a link or another model than the trained one.
    """
    if missing := [stage for stage in NEEDED[kind] if stage not in folders]:
        raise InputError(f"cannot publish the {kind}: stage {missing[0]} is not finished; run the recipe first")
    if kind == "dataset":
        return _rows(folders, made)
    trained = folders.get("align") or folders.get("train") or Path()
    if kind in HF_KINDS:
        folder = folders["export"] / kind
    else:
        folder = trained / "adapter" if kind == "adapter" else folders["merge" if kind == "merged" else "export"]
    ending = "*.gguf" if kind == "gguf" else "*.safetensors"
    if not any(folder.glob(ending)):
        raise InputError(f"cannot publish the {kind}: no {ending} in {folder}; run the recipe again")
    contents = {n: p for n, p in _files(folder).items() if kind != "gguf" or "/" not in n}  # no quantised folder
    _refuse_leaks(kind, contents, folders)
    if kind == "gguf":
        _check_gguf(contents, folders)
    return contents, {}


def _files(folder: Path) -> dict[str, Path]:
    """Return the files of a stage's folder, without the store's files and without a card."""
    skipped = {CARD, "manifest.json", "building.json"}
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: path for name, path in files.items() if name not in skipped and not name.startswith("lease.")}


def _rows(folders: Mapping[str, Path], made: Path) -> tuple[dict[str, Path], dict[str, dict[str, Any]]]:
    from finetune.publish.dataset_files import write_curated

    stage = next((stage for stage in ROW_STAGES if stage in folders), None)
    if stage is None:
        raise InputError("cannot publish the dataset: no stage with rows is finished; run the recipe first")
    named = ("train", "eval") if stage == "split" else ("rows",)
    contents, facts = {}, {}
    for name in named:
        split = "train" if name == "rows" else name
        path = made / "data" / f"{split}.parquet"
        facts[split] = write_curated(folders[stage] / f"{name}.parquet", path)
        contents[f"data/{split}.parquet"] = path
    return contents, facts


def _check_gguf(contents: Mapping[str, Path], folders: Mapping[str, Path]) -> None:
    """Check in each file's header that template and terminators are the trained ones."""
    from finetune.gguf.writer import read_facts

    place = folders.get("render", Path()) / "template"
    if not (place / "template.json").exists():
        return
    trained, ends = (place / "inference.jinja").read_text(encoding="utf-8"), read_json(place / "template.json")
    for name, path in contents.items():
        if not name.endswith(".gguf"):
            continue
        facts = read_facts(path)
        missing = set(ends["terminators"][:3]) - set(facts["terminators"])  # the format has keys for three
        if facts["template"] != trained or missing:
            what = "its chat template is" if facts["template"] != trained else "its terminators are"
            raise InputError(f"cannot publish {path}: {what} not what was trained; run the recipe again")


def _refuse_leaks(kind: Kind, contents: Mapping[str, Path], folders: Mapping[str, Path]) -> None:
    for name, path in contents.items():
        if path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve()):
            raise InputError(f"cannot publish {path}: it is a link to a file outside its folder")
        if (not name.endswith(SCANNED) and name != MODELFILE) or path.stat().st_size > SCANNED_BYTES:
            continue
        if secrets := find_secrets(path.read_text(encoding="utf-8", errors="replace")):
            raise InputError(f"cannot publish {path}: it holds {secrets[0]}")
        if name in ("adapter_config.json", "config.json", "generation_config.json", "tokenizer_config.json"):
            for field, value in _local_paths(read_json(path), everywhere=name != "tokenizer_config.json"):
                raise InputError(
                    f"cannot publish {path}: {field} is {value!r}, a path of this machine; rebuild the stage so "
                    "that it names the Hub id"
                )
    if kind == "adapter":
        _check_base(contents.get("adapter_config.json"), read_json(folders["base"] / "base.json"))


def _local_paths(value: object, everywhere: bool, field: str = "") -> Iterator[tuple[str, str]]:
    """Yield (field, value) of every string that is a local path; a tokenizer's other strings are tokens."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _local_paths(inner, everywhere or "path" in key, f"{field}.{key}" if field else key)
    elif isinstance(value, list):
        for inner in value:
            yield from _local_paths(inner, everywhere, field)
    elif everywhere and isinstance(value, str) and _LOCAL_PATH.fullmatch(value):
        yield field, value


def _check_base(config: Path | None, base: Mapping[str, Any]) -> None:
    """Check that the adapter names a public base, the one it was trained on."""
    if config is None:
        raise InputError("cannot publish the adapter: adapter_config.json is missing; run the recipe again")
    if base["kind"] == "folder":
        raise InputError(
            f"cannot publish the adapter: its base {base['id']} is a local folder, which others do not have; "
            "publish the merged model instead (`what: [merged]`)"
        )
    written = read_json(config)
    for field, key in (("base_model_name_or_path", "id"), ("revision", "revision")):
        if written.get(field) != base[key]:
            raise InputError(
                f"cannot publish {config}: {field} is {written.get(field)!r}, but the adapter was trained on "
                f"{base[key]!r}; train again"
            )
