"""What a recipe says of its rows: where they come from, which are used, which are held out. Also the common types.

The sentence below a field is its documentation: `recipe/reference.py` makes recipes/schema.json and
docs/recipe-reference.md of it (they read this file: pydantic's own way to it costs every start of the program 30 ms).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

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
STATIC = "model2vec:"  # before the name of a static embedding model
OWN = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"
LANGUAGE = r"^[a-z]{2,3}$"
PATTERN_WORDS = {  # what an error says in place of the expression
    HUB_NAME: "a name as on the Hub: OWNER/NAME",
    REPOSITORY: "OWNER/NAME",
    REVISION: "a branch, a tag or a commit",
    RECIPE_NAME: "letters, digits and _ - . (it names a folder)",
    KEEP: "longest, first or column:NAME",
    BY: "tokens or column:NAME",
    OWN: "MODULE:FUNCTION, as in my_rules:too_short",
    LANGUAGE: "a language's code, as in en",
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


class Section(BaseModel):
    """Common to every part of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), populate_by_name=True)


def refuse(found: Sequence[tuple[tuple[str | int, ...], str]]) -> None:
    """From inside a validator: an error for each (field's path, sentence), all at once; nothing where there is none."""
    if found:
        details: list[InitErrorDetails] = [
            {"type": PydanticCustomError("contradiction", "{why}", {"why": why}), "loc": at, "input": None}
            for at, why in found
        ]
        raise ValidationError.from_exception_data("recipe", details)


def local_path(text: str) -> Path:
    """`text` as a path, `~` being a home folder; ValueError where nothing on this machine can be called so."""
    try:
        path = Path(text).expanduser()
        path.exists()  # which raises where a name is too long
    except RuntimeError:
        raise ValueError(f"there is no home folder {text.partition('/')[0]}") from None
    except OSError as error:
        raise ValueError(f"it cannot be looked at: {error.strerror}") from None
    return path


def is_folder_name(name: str) -> bool:
    """Whether a model's name means a folder here, since the Hub has no such names."""
    return name.startswith(("/", "./", "../", "~")) or not re.fullmatch(HUB_NAME, name)


def resolve_path(value: str, info: ValidationInfo) -> Path:
    """A path of the recipe as an absolute one: beside the recipe first, else under the working directory.

    A relative path may not climb out with `..`: a recipe somebody sends you must not read your other folders.
    """
    path = local_path(value)
    if path.is_absolute():
        return path
    stays_inside(path, value)
    context = info.context or {}
    beside = Path(context.get("folder", ".")).absolute() / path
    return beside if beside.exists() else Path(context.get("working_folder", ".")).absolute() / path


def glob_parts(path: Path) -> tuple[Path, str] | None:
    """The folder and the pattern of a path with *, ? or [ ], or None for any other path, and for a file called so."""
    first = next((i for i, part in enumerate(path.parts) if any(c in part for c in "*?[")), None)
    if first is None or path.exists():
        return None
    return Path(*path.parts[:first]), "/".join(path.parts[first:])


def resolve_paths(value: object, info: ValidationInfo) -> object:
    """A path, or a list of paths, resolved; a pattern is looked for beside the recipe if a file there matches it."""
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


def path_of(field: str, value: str, info: ValidationInfo, written: str | None = None) -> Path:
    """`resolve_path`, with a refusal that names the field; `written` is what the file has where that is more."""
    try:
        return resolve_path(value, info)
    except ValueError as error:
        refuse([((field,), f"found {(written or value)[:60]!r}; {error}")])
        raise


def stays_inside(path: Path, written: str) -> None:
    """Refuse a relative path that climbs out."""
    if not path.is_absolute() and ".." in path.parts:
        raise ValueError(
            f"{written!r} climbs out: a relative path stays inside the recipe's folder; else write it whole, /…"
        )


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
        raise ValueError("no encoding of that name; as in utf-16, cp1252, latin-1, gb18030, shift_jis") from None
    return name


Pattern = Annotated[str, BeforeValidator(lambda v: _compiles(v) if isinstance(v, str) else v)]


class _SourceFields(Section):
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often the rows are used, applied after duplicates are gone: 2 takes each twice, 0.5 half of them."""
    rows: Count | None = None
    """Use this many of the rows, chosen by the seed after duplicates are gone; all where there are fewer."""
    columns: dict[str, str] = {}
    """Names the format gives to columns → names they have here, as in {instruction: question, output: answer}."""
    take: Count | None = None
    """Read this many rows at most; null reads all."""
    skip: Annotated[int, Field(ge=0)] = 0
    """Leave out this many rows at the start."""
    raw: bool = False
    """With `format: text`: learn whole texts, also a user's words and a chat template's control tokens in them."""

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if self.rows is not None and self.weight != 1:
            refuse([(("rows",), "rows and weight both say how many rows are used: keep one")])
        if self.rows is not None and self.take is not None and self.rows > self.take:
            refuse([(("rows",), f"{self.rows} rows are to be used and only take {self.take} are read")])
        if self.raw and getattr(self, "format", "auto") != "text":
            refuse([(("raw",), "only texts can be learned whole; set format: text, or leave raw out")])
        return self


class HubSource(_SourceFields):
    """A dataset on the Hugging Face Hub."""

    source: Literal["hub"]
    """A dataset on the Hub."""
    id: HubId
    """OWNER/NAME of the dataset."""
    config: str | None = None
    """The dataset's configuration (subset), where it has several."""
    split: str = "train"
    """The dataset's split."""
    revision: Revision | None = None
    """A branch, tag or commit; null takes the newest commit and pins it."""
    streaming: bool = False
    """Read rows as they come, so that `take` does not download the whole dataset."""
    format: Format = "auto"
    """How a row is laid out; auto looks at the columns of the first 100 rows and says what it found."""

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
    """A file, a folder, a pattern as in part-*.jsonl, or a list: beside the recipe, else under the working folder."""
    format: Format = "auto"
    """How a row is laid out; auto looks at the columns of the first 100 rows and says what it found."""
    encoding: Annotated[str, AfterValidator(_is_encoding)] | None = None
    """The encoding of a text file, as in cp1252 or utf-16; null: UTF-8."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """What the recipe names, as a list."""
        return self.path if isinstance(self.path, tuple) else (self.path,)

    @property
    def label(self) -> str:
        """The source's name in row ids."""
        first, *others = self.paths
        return f"{first.name}+{len(others)}" if others else first.name


class PydocSource(_SourceFields):
    """Instruction rows made from the documentation of the Python that runs this."""

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
    """How strict reading is."""

    max_refused_fraction: Fraction = 0.01
    """Stop (exit 2) where a larger share of all rows cannot be read as their format."""
    ignore: list[str] = []
    """Columns that are not read, although their names mean something in a known format."""


class MinHash(Section):
    """Near-duplicates by wording: the share of their runs of words that two rows have in common (Jaccard)."""

    threshold: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of all the runs of two rows, from which they are near-duplicates; no two kept rows reach it."""
    ngram: Annotated[int, Field(ge=1, le=50)] = 5
    """Words or signs in a run."""


class Dedup(Section):
    """Exact duplicates, near-duplicates by wording, near-duplicates by cosine."""

    exact: bool = True
    """Drop rows whose text is the same but for case and white space."""
    minhash: MinHash | None = None
    """Drop rows that share most runs of words with a kept one; {} takes the defaults, null: not by wording."""
    embedding: Annotated[str, Field(min_length=1)] | None = "lsa"
    """What makes the vectors: lsa, a Hub model or a folder (static ones after `model2vec:`); null: no cosine."""
    field: Literal["instruction", "output", "both"] = "both"
    """Which text is compared: the user's, the assistant's, or all."""
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Cosine from which two rows are near-duplicates; no two kept rows reach it."""
    keep: Annotated[str, Field(pattern=KEEP)] = "longest"
    """Which row of several stays: longest, first, or column:NAME for the largest figure in a column."""
    max_dropped_fraction: Fraction = 0.9
    """Stop (exit 3) where a larger share of the rows would be dropped."""
    embedding_folder: SkipJsonSchema[Annotated[Path | None, Field(exclude=True)]] = None

    @model_validator(mode="before")
    @classmethod
    def _embedding_path(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, dict) and info.context and "embedding_folder" in value:
            refuse([(("embedding_folder",), "unknown field; write the folder as embedding: /path or ./path")])
        if not isinstance(value, dict) or not isinstance(value.get("embedding"), str) or "embedding_folder" in value:
            return value
        kind = STATIC if value["embedding"].startswith(STATIC) else ""
        name = value["embedding"].removeprefix(kind)
        if kind and not name:
            refuse([(("embedding",), f"found {kind!r}; it needs a model on the Hub or a folder behind it")])
        if not name or not is_folder_name(name):
            return value
        path = path_of("embedding", name, info, value["embedding"])
        return {**value, "embedding": f"{kind}folder:{path.name}", "embedding_folder": path}


class Decontaminate(Section):
    """Drop training rows that share text or meaning with evaluation data."""

    against: Annotated[list[Source], Field(min_length=1)]
    """The evaluation data: sources as under `data`."""
    ngram: Annotated[int, Field(ge=5, le=50)] = 13
    """Words in a row that must be shared for a training row to be dropped."""
    embedding_threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    """Drop rows whose question reaches this cosine with one there, by dedup.embedding or lsa; null: by words only."""


class Sample(Section):
    """Which of the curated rows are used: all of them, or by one rule the k best, n at random, or n unlike ones."""

    top_k: Count | None = None
    """Use this many rows, those that are first by `by`."""
    by: Annotated[str, Field(pattern=BY)] = "tokens"
    """What top_k takes the most of: tokens, or column:NAME for the figure in a column of the source."""
    random: Count | None = None
    """Use this many rows, chosen by a hash of seed and row id."""
    diverse: Count | None = None
    """Use this many rows, taken by turns from clusters of the dedup stage's vectors, nearest the centre first."""
    clusters: Annotated[int, Field(ge=2)] | None = None
    """Clusters for diverse; null makes as many as the root of the number of rows, at most `diverse`."""

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        rules = {"top_k": self.top_k, "random": self.random, "diverse": self.diverse}
        asked = [name for name, rows in rules.items() if rows]
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)} are {('two', 'three')[len(asked) - 2]} different rules: keep one")
        if self.by != "tokens" and not self.top_k:
            refuse([(("by",), "only top_k ranks rows; add top_k, or leave by out")])
        if self.clusters is not None and not self.diverse:
            refuse([(("clusters",), "only diverse makes clusters; add diverse, or leave clusters out")])
        if self.clusters and self.diverse and self.clusters > self.diverse:
            refuse([(("clusters",), f"{self.clusters} clusters cannot all be seen by diverse {self.diverse} rows")])
        return self


class Split(Section):
    """The held-out share, taken by whole near-duplicate groups."""

    eval_fraction: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    """Share of the rows that is held out, at most."""
    max_eval_rows: Count = 1000
    """Rows that are held out, at most."""
    group_threshold: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Cosine from which two rows stay on the same side."""
