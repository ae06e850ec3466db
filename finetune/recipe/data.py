"""Recipe sections about rows: sources, deduplication, decontamination, sampling, held-out split. Also common types.

The string below a field is its documentation: `recipe/reference.py` builds recipes/schema.json and
docs/recipe-reference.md from it by parsing this file (pydantic's `use_attribute_docstrings` costs 30 ms at each start).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import InitErrorDetails, PydanticCustomError

HUB_NAME = r"^[\w][\w.-]*(/[\w][\w.-]*)?$"
REPOSITORY = r"^[\w][\w.-]*/[\w][\w.-]*$"
REVISION = r"^[\w][\w./-]*$"
RECIPE_NAME = r"^[\w][\w.-]*$"
KEEP = r"^(longest|first|column:.+)$"
BY = r"^(tokens|column:.+)$"
STATIC = "model2vec:"  # prefix of a static embedding model's name
OWN = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"
LANGUAGE = r"^[a-z]{2,3}$"
ENDPOINT = r"^https?://[^/\s@]+(/[^\s@]*)?$"
PATTERN_WORDS = {  # wording of an error in place of the pattern
    HUB_NAME: "a name as on the Hub: OWNER/NAME",
    REPOSITORY: "OWNER/NAME",
    REVISION: "a branch, a tag or a commit",
    RECIPE_NAME: "letters, digits and _ - . (it names a folder)",
    KEEP: "longest, first or column:NAME",
    BY: "tokens or column:NAME",
    OWN: "MODULE:FUNCTION, as in my_rules:too_short",
    LANGUAGE: "a language's code, as in en",
    ENDPOINT: "an address as http://127.0.0.1:8000/v1, without a password (the key is in FINETUNE_API_KEY)",
}

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
HubId = Annotated[str, Field(pattern=HUB_NAME, max_length=200)]
Revision = Annotated[str, Field(pattern=REVISION, max_length=200)]
Format = Literal[
    "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "llama2_text", "text", "preference", "kto"
]  # the last two: preference.data only
PAIR_FORMATS = ("preference", "kto")


Contradiction = tuple[tuple[str | int, ...], str]  # the field's path, and what is wrong with it
T = TypeVar("T")


class Section(BaseModel):
    """Base class of all recipe sections; `_contradictions` yields what is wrong with fields that are valid alone."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), populate_by_name=True)

    def _contradictions(self) -> Iterator[Contradiction]:
        yield from ()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        refuse(list(self._contradictions()))
        return self


def refuse(mistakes: Sequence[Contradiction]) -> None:
    """Raise one validation error for each (field's path, sentence); call it inside a validator. No effect if empty."""
    if mistakes:
        details: list[InitErrorDetails] = [
            {"type": PydanticCustomError("contradiction", "{why}", {"why": why}), "loc": at, "input": None}
            for at, why in mistakes
        ]
        raise ValidationError.from_exception_data("recipe", details)


def local_path(text: str) -> Path:
    """Return `text` as a path with `~` expanded. Raises ValueError if it is not a valid path on this machine."""
    try:
        path = Path(text).expanduser()
        path.exists()  # raises OSError if a name is too long
    except RuntimeError:
        raise ValueError(f"no home folder {text.partition('/')[0]}") from None
    except OSError as error:
        raise ValueError(f"the path cannot be read: {error.strerror}") from None
    return path


def resolve_path(value: str, info: ValidationInfo) -> Path:
    """Return a path of the recipe as an absolute one: next to the recipe, else under the working directory.

    A relative path must not leave the folder with `..`: a recipe from a third party must not read other folders.
    """
    path = local_path(value)
    if path.is_absolute():
        return path
    if ".." in path.parts:
        raise ValueError(f"{value!r} leaves the recipe's folder; use a path inside it or an absolute path, /…")
    context = info.context or {}
    beside = Path(context.get("folder", ".")).absolute() / path
    return beside if beside.exists() else Path(context.get("working_folder", ".")).absolute() / path


def glob_parts(path: Path) -> tuple[Path, str] | None:
    """Return folder and pattern of a path with *, ? or [ ]; None for any other path, or if a file has that name."""
    first = next((i for i, part in enumerate(path.parts) if any(c in part for c in "*?[")), None)
    if first is None or path.exists():
        return None
    return Path(*path.parts[:first]), "/".join(path.parts[first:])


def resolve_paths(value: object, info: ValidationInfo) -> object:
    """Resolve a path or a list of paths; a pattern is resolved next to the recipe if a file there matches it."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(part, (str, Path)) for part in value):
        return tuple(resolve_paths(part, info) for part in value)
    if isinstance(value, Path):
        return value
    if not isinstance(value, str):
        raise ValueError("allowed: a path, or a list of paths")
    path = resolve_path(value, info)
    if Path(value).is_absolute() or value.startswith("~") or glob_parts(path) is None:
        return path
    beside = Path((info.context or {}).get("folder", ".")).absolute() / value
    parts = glob_parts(beside)
    return beside if parts and next(parts[0].glob(parts[1]), None) is not None else path


def with_path(
    value: object,
    info: ValidationInfo,
    field: str,
    into: str,
    *,
    how: str,
    is_path: Callable[[str], bool] = lambda text: True,
    prefix: str = "",
    kind: str = "",
) -> object:
    """Return a section's raw fields with the path in `field` resolved into `into`, and `kind` and its name in `field`.

    A file may not set `into`: the error tells `how` to write the path. Text for which `is_path` is false stays.
    `prefix` stands before the path and is kept.
    """
    if not isinstance(value, dict):
        return value
    if info.context and into in value:  # only a file has a context
        refuse([((into,), f"unknown field; write {how}")])
    text = value.get(field)
    if into in value or not isinstance(text, str) or not is_path(text.removeprefix(prefix)):
        return value
    try:
        path = resolve_path(text.removeprefix(prefix), info)
    except ValueError as error:
        refuse([((field,), f"found {text[:60]!r}; {error}")])
        raise
    return {**value, field: f"{prefix}{kind}{path.name}", into: path}


def used_once(at: tuple[str | int, ...], sources: Sequence[Source], what: str) -> Iterator[Contradiction]:
    """Yield a contradiction for each source that limits or repeats rows which are used once each."""
    for number, source in enumerate(sources):
        for name in ("rows", "weight"):
            if getattr(source, name) != type(source).model_fields[name].default:
                yield (*at, number, name), f"{what} are used once each; limit them with take, or leave this out"


def each_once(values: list[T]) -> list[T]:
    """Return a list without repeats as it is. Raises ValueError with the first value that is repeated."""
    for number, value in enumerate(values):
        if value in values[:number]:
            raise ValueError(f"{value} is listed twice; keep one")
    return values


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return pattern


def _is_encoding(name: str) -> str:
    try:
        "".encode(name)
    except (LookupError, ValueError):
        raise ValueError(
            "unknown encoding; allowed: a Python codec such as utf-16, cp1252, latin-1, gb18030, shift_jis"
        ) from None
    return name


Pattern = Annotated[str, BeforeValidator(lambda v: _compiles(v) if isinstance(v, str) else v)]


class _SourceFields(Section):
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often the rows are used, applied after deduplication: 2 uses each twice, 0.5 half of them."""
    rows: Count | None = None
    """Use this many of the rows, chosen by the seed after deduplication; all if there are fewer."""
    columns: dict[str, str] = {}
    """Column names of the format → column names in the file, as in {instruction: question, output: answer}."""
    take: Count | None = None
    """Read this many rows at most; null reads all."""
    skip: Annotated[int, Field(ge=0)] = 0
    """Skip this many rows at the start."""
    raw: bool = False
    """With `format: text`: learn the whole text, including user turns and control tokens of a chat template in it."""

    def _contradictions(self) -> Iterator[Contradiction]:
        if self.rows is not None and self.weight != 1:
            yield ("rows",), "rows and weight both set how many rows are used; keep one"
        elif self.rows is not None and self.take is not None and self.rows > self.take:
            yield ("rows",), f"{self.rows} rows are to be used and only take {self.take} are read"
        if self.raw and getattr(self, "format", "auto") != "text":
            yield ("raw",), "raw needs format: text; set that, or remove raw"


class HubSource(_SourceFields):
    """A dataset on the Hugging Face Hub."""

    source: Literal["hub"]
    """A dataset on the Hub."""
    id: HubId
    """OWNER/NAME of the dataset."""
    config: str | None = None
    """The dataset's configuration (subset), if it has several."""
    split: str = "train"
    """The dataset's split."""
    revision: Revision | None = None
    """A branch, tag or commit; null pins the newest commit."""
    streaming: bool = False
    """Stream the rows, so that `take` does not download the whole dataset."""
    format: Format = "auto"
    """How a row is laid out; auto looks at the columns of the first 100 rows and reports the format."""

    @property
    def label(self) -> str:
        """The source's name in row ids."""
        return self.id


class LocalSource(_SourceFields):
    """Files of rows: jsonl, json, csv or tsv, plain or as .gz or .zst; parquet; Arrow, also a save_to_disk folder."""

    source: Literal["local"]
    """Files on this machine."""
    path: Annotated[Path | Annotated[tuple[Path, ...], Field(min_length=1)], BeforeValidator(resolve_paths)] = Field(
        exclude=True
    )
    """A file, a folder, a pattern (part-*.jsonl) or a list: next to the recipe, else under the working folder."""
    format: Format = "auto"
    """How a row is laid out; auto looks at the columns of the first 100 rows and reports the format."""
    encoding: Annotated[str, AfterValidator(_is_encoding)] | None = None
    """The encoding of a text file, as in cp1252 or utf-16; null: UTF-8."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """The recipe's paths as a tuple."""
        return self.path if isinstance(self.path, tuple) else (self.path,)

    @property
    def label(self) -> str:
        """The source's name in row ids."""
        first, *others = self.paths
        return f"{first.name}+{len(others)}" if others else first.name


class PydocSource(_SourceFields):
    """Instruction rows built from the docstrings of Python's standard library."""

    source: Literal["pydoc"]
    """Rows made here, from docstrings of the standard library."""
    format: Literal["messages", "preference", "kto"] = "messages"
    """Rows of messages; under preference.data pairs (preference) or single answers with a label (kto)."""

    @property
    def label(self) -> str:
        """The source's name in row ids."""
        return "pydoc"


Source = Annotated[HubSource | LocalSource | PydocSource, Discriminator("source")]


class Ingest(Section):
    """Limits on rows that cannot be read."""

    max_refused_fraction: Fraction = 0.01
    """Stop (exit 2) if a larger share of all rows cannot be read in their format."""
    ignore: list[str] = []
    """Columns to ignore although a known format uses their names."""


class Jaccard(Section):
    """Near-duplicates by wording: exact Jaccard similarity of the word n-grams of two rows."""

    threshold: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Similarity from which two rows are near-duplicates; no two kept rows reach it."""
    ngram: Annotated[int, Field(ge=1, le=50)] = 5
    """Words per n-gram (characters for scripts without spaces)."""


class Dedup(Section):
    """Exact duplicates, near-duplicates by wording (Jaccard), near-duplicates by meaning (cosine)."""

    exact: bool = True
    """Drop rows whose text is equal to a kept one except for case and white space."""
    jaccard: Jaccard | None = None
    """Drop rows that share most word n-grams with a kept one; {} takes the defaults, null turns it off."""
    embedding: Annotated[str, Field(min_length=1)] | None = "lsa"
    """Embedding model: lsa, a Hub model or a folder (prefix `model2vec:` for a static one); null: no cosine."""
    field: Literal["instruction", "output", "both"] = "both"
    """The text compared: of the user, of the assistant, or both."""
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Cosine from which two rows are near-duplicates; no two kept rows reach it."""
    keep: Annotated[str, Field(pattern=KEEP)] = "longest"
    """The row kept of several: longest, first, or column:NAME for the largest number in a column."""
    max_dropped_fraction: Fraction = 0.9
    """Stop (exit 3) if a larger share of the rows would be dropped."""
    exhaustive: bool = False
    """Compare every pair of vectors; else a CPU searches over 100,000 rows with a measured recall of 0.999 or more."""
    embedding_folder: SkipJsonSchema[Annotated[Path | None, Field(exclude=True)]] = None

    @model_validator(mode="before")
    @classmethod
    def _embedding_path(cls, value: object, info: ValidationInfo) -> object:
        written = value.get("embedding") if isinstance(value, dict) else None
        static = STATIC if isinstance(written, str) and written.startswith(STATIC) else ""
        if static and written == static:
            refuse([(("embedding",), f"found {static!r}; write a Hub model or a folder after it")])
        return with_path(  # a folder's name has a form that Hub names cannot have
            value, info, "embedding", "embedding_folder", how="the folder as embedding: /path or ./path",
            is_path=lambda name: name != "" and not re.fullmatch(HUB_NAME, name), prefix=static, kind="folder:",
        )  # fmt: skip


class Decontaminate(Section):
    """Drop training rows and preference pairs that share text or meaning with evaluation data."""

    against: Annotated[list[Source], Field(min_length=1)]
    """The evaluation data: sources as under `data`."""
    ngram: Annotated[int, Field(ge=5, le=50)] = 13
    """Consecutive words that a training row must share to be dropped."""
    embedding_threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    """Drop rows whose question reaches this cosine (dedup.embedding or lsa) with one there; null: by words only."""


class Sample(Section):
    """Selection of curated rows: all, or one of the k best, n at random, n diverse."""

    top_k: Count | None = None
    """Use this many rows, those with the largest `by`."""
    by: Annotated[str, Field(pattern=BY)] = "tokens"
    """The value that top_k ranks by: tokens, or column:NAME for a number in a column of the source."""
    random: Count | None = None
    """Use this many rows, chosen by a hash of seed and row id."""
    diverse: Count | None = None
    """Use this many rows, taken in turn from clusters of the dedup stage's vectors, nearest to the centre first."""
    clusters: Annotated[int, Field(ge=2)] | None = None
    """Clusters for diverse; null takes the square root of the number of rows, at most `diverse`."""

    def _contradictions(self) -> Iterator[Contradiction]:
        asked = [name for name in ("top_k", "random", "diverse") if getattr(self, name)]
        if len(asked) > 1:
            yield (), f"{' and '.join(asked)} are different rules: keep one"
        if self.by != "tokens" and not self.top_k:
            yield ("by",), "only top_k ranks rows; add top_k, or remove by"
        if self.clusters is not None and not self.diverse:
            yield ("clusters",), "only diverse makes clusters; add diverse, or remove clusters"
        if self.clusters and self.diverse and self.clusters > self.diverse:
            why = f"{self.clusters} clusters are more than diverse {self.diverse} rows; allowed: at most diverse"
            yield ("clusters",), why


class Split(Section):
    """The held-out rows; near-duplicates stay on the same side."""

    eval_fraction: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    """Largest share of the rows that is held out."""
    max_eval_rows: Count = 1000
    """Largest number of rows held out."""
    group_threshold: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Cosine from which two rows stay on the same side."""
