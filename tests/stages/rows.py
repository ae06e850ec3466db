"""Rows and folders for tests of the curation stages."""

from pathlib import Path

from finetune.context import Context
from finetune.data.records import Example, Message, read_rows, write_rows
from finetune.recipe import Recipe, Runtime, Tracking


def chat(number, question, answer, source="a", extra=None):
    return Example(f"{source}:{number}", source, (Message("user", question), Message("assistant", answer)), extra=extra)


def folder(path: Path, rows) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    write_rows(path / "rows.parquet", rows)
    return path


def ids(path: Path):
    return [row.id for row in read_rows(path)]


def context(path: Path, **more) -> Context:
    return Context(scratch=path, runtime=Runtime(), tracking=Tracking(), device="cpu", **more)


def recipe(**sections) -> Recipe:
    base = {
        "name": "t",
        "model": "builtin:tiny-mistral",
        "data": [{"source": "local", "path": "/none/a", "format": "auto"}],
    }
    return Recipe.model_validate(base | sections)


def sentences(count, topic=""):
    """Texts that no method takes for duplicates."""
    return [" ".join(f"{topic}{i}w{(i * 31 + k * k * 7) % 997}" for k in range(12)) for i in range(count)]
