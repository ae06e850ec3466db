"""Which files a path of the recipe means: a file, a folder, a pattern, a list of these, or a folder of `datasets`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.data.readers import ENDINGS, content_digest, file_ending
from finetune.data.values import listed
from finetune.errors import InputError
from finetune.recipe.data import glob_parts
from finetune.utils.files import read_json
from finetune.utils.limits import reading
from finetune.utils.links import way_out

SPLITS = "dataset_dict.json"  # in a folder that DatasetDict.save_to_disk wrote
STATE = "state.json"  # in one that Dataset.save_to_disk wrote
EVALUATION = re.compile(r"(?i)(^|[^a-z])(test|valid|validation|val|dev|eval|evaluation|holdout|heldout)([^a-z]|$)")
TRAINED_ON = "{} by name is evaluation data, and is trained on like the other files; name it under eval_data instead"
FACTS = (SPLITS, STATE, "dataset_info.json", "dataset_infos.json")  # about rows; no rows


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of rows; `name` is the part of its path that does not depend on the folder of the data."""

    path: Path
    name: str


def data_files(paths: Sequence[Path]) -> list[DataFile]:
    """The files that `paths` mean, ordered by name, each once. A single file's name is its own.

    Raises InputError for a path that means no file, or a folder whose splits are to be chosen from.
    """
    files = [file for path in paths for file in _meant(path)]
    unique = {str(file.path.absolute()): file for file in files}
    if len({file.name for file in unique.values()}) < len(unique):  # like names in several folders
        common = os.path.commonpath([Path(p).parent for p in unique])
        unique = {p: DataFile(f.path, Path(p).relative_to(common).as_posix()) for p, f in unique.items()}
    return sorted(unique.values(), key=lambda file: file.name)


def is_one_file(paths: Sequence[Path]) -> bool:
    """Whether the recipe names one file by its own path, so that its row ids need no file name."""
    return len(paths) == 1 and glob_parts(paths[0]) is None and not paths[0].is_dir()


def skipped_files(paths: Sequence[Path]) -> list[str]:
    """Names of files in the folders of `paths` that are not read, since their names do not end like those of rows."""
    return [p.name for path in paths if path.is_dir() for p in _inside(path) if not _is_data(p) and p.name not in FACTS]


def evaluation_files(paths: Sequence[Path]) -> list[str]:
    """Names of files that a folder or a pattern brings along with others, and that are for evaluation by their names.

    Files that are named one by one were chosen; so were they if there are no others.
    """
    files = data_files([path for path in paths if path.is_dir() or glob_parts(path) is not None])
    names = [file.name for file in files if EVALUATION.search(Path(file.name).stem)]
    return names if len(names) < len(data_files(paths)) else []


def digest(paths: Sequence[Path]) -> dict[str, object]:
    """Names and digests of all files, ordered by name; one file that is named itself has {"file", "xxh3_128"}."""
    if is_one_file(paths):
        return {"file": paths[0].name, "xxh3_128": content_digest(paths[0])}
    return {"files": [{"file": f.name, "xxh3_128": content_digest(f.path)} for f in data_files(paths)]}


def _meant(path: Path) -> Iterator[DataFile]:
    if (parts := glob_parts(path)) is not None:
        folder, pattern = parts
        matches = [p for p in folder.glob(pattern) if p.is_file()]
        for match in matches:
            _require_no_way_out(match, folder)
        if not matches:
            raise InputError(f"no file matches {path}; a relative path is looked for beside the recipe, then under the "
                             "working folder")  # fmt: skip
        yield from (DataFile(p, p.relative_to(folder).as_posix()) for p in matches)
    elif path.is_dir():
        yield from _in_folder(path)
    else:
        yield DataFile(path, path.name)


def _in_folder(folder: Path) -> Iterator[DataFile]:
    if (folder / SPLITS).is_file():
        with reading(f"{folder / SPLITS} is not what datasets writes; save the data set again"):
            splits = [str(name) for name in read_json(folder / SPLITS)["splits"]]
            first = splits[0]
        raise InputError(f"{folder} holds the splits {listed(splits)}; name one of them: {folder}/{first}")
    if (folder / STATE).is_file():
        with reading(f"{folder / STATE} is not what datasets writes; save the data set again"):
            written = [folder / str(entry["filename"]) for entry in read_json(folder / STATE).get("_data_files", [])]
        files = written or sorted(folder.glob("*.arrow"))
        for path in files:
            _require_no_way_out(path, folder)
    else:
        files = [path for path in _inside(folder) if _is_data(path)]
    if not files:
        raise InputError(f"{folder} is a folder without a file of rows; allowed endings: {', '.join(ENDINGS)}")
    yield from (DataFile(path, path.relative_to(folder).as_posix()) for path in files)


def _inside(folder: Path) -> Iterator[Path]:
    """The files in a folder and the folders in it, hidden ones left out.

    Raises InputError for a link out of the folder to a file of rows or to another folder.
    """
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.is_symlink() and (path.is_dir() or _is_data(path)):
            _require_no_way_out(path, folder)
        if path.is_file():
            yield path


def _require_no_way_out(path: Path, folder: Path) -> None:
    """Raise InputError for a file that only a link, or `..` in a list of files, puts into the folder.

    The folder may come from a third party. A snapshot of the Hub's cache consists of links to its blobs, and may.
    """
    if (link := way_out(path, folder)) is None:
        return
    real = Path(os.path.realpath(folder))
    blobs = real.parent.parent / "blobs" if real.parent.name == "snapshots" else None
    target = Path(os.path.realpath(link))
    if blobs is not None and link.is_symlink() and not blobs.is_symlink() and target.parent == blobs:
        return
    raise InputError(
        f"{link} leads to {target}, outside {folder}; name that file or folder as a path of its own if its rows are "
        "meant, or remove the link"
    )


def _is_data(path: Path) -> bool:
    if path.name in FACTS:
        return False
    try:
        file_ending(path)
    except InputError:
        return False
    return True
