"""What a recipe says of its rows: where they come from, which are kept, which are held out. Also the common types.

The sentence below a field is its documentation: `reference.py` makes recipes/schema.json and docs/recipe-reference.md
of it (by reading this file, for pydantic's own way to it costs every start of the program 30 ms).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

HUB_NAME = r"^[\w][\w.-]*(/[\w][\w.-]*)?$"
REPOSITORY = r"^[\w][\w.-]*/[\w][\w.-]*$"
REVISION = r"^[\w][\w./-]*$"
RECIPE_NAME = r"^[\w][\w.-]*$"
KEEP = r"^(longest|first|column:.+)$"
PATTERN_WORDS = {  # what an error says in place of the expression
    HUB_NAME: "a name as on the Hub: OWNER/NAME",
    REPOSITORY: "OWNER/NAME",
    REVISION: "a branch, a tag or a commit",
    RECIPE_NAME: "letters, digits and _ - . (it names a folder)",
    KEEP: "longest, first or column:NAME",
}

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
HubId = Annotated[str, Field(pattern=HUB_NAME, max_length=200)]
Revision = Annotated[str, Field(pattern=REVISION, max_length=200)]
Format = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "llama2_text", "text"]


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
    if ".." in path.parts:
        raise ValueError(
            f"{value!r} climbs out: a relative path stays inside the recipe's folder; else write it whole, /…"
        )
    context = info.context or {}
    beside = Path(context.get("folder", ".")).absolute() / path
    return beside if beside.exists() else Path(context.get("working_folder", ".")).absolute() / path


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return pattern


Pattern = Annotated[str, BeforeValidator(lambda v: _compiles(v) if isinstance(v, str) else v)]


class _SourceFields(Section):
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often the rows are used, applied after duplicates are gone: 2 takes each twice, 0.5 half of them."""
    columns: dict[str, str] = {}
    """Names the format gives to columns → names they have here, as in {instruction: question, output: answer}."""
    take: Count | None = None
    """Read this many rows at most; null reads all."""
    skip: Annotated[int, Field(ge=0)] = 0
    """Leave out this many rows at the start."""


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
    """A jsonl, json, csv or parquet file, plain or as .gz or .zst."""

    source: Literal["local"]
    """A file on this machine."""
    path: Annotated[Path, BeforeValidator(lambda v, i: resolve_path(v, i) if isinstance(v, str) else v)] = Field(
        exclude=True
    )
    """The file: beside the recipe, else under the working folder, else absolute. `..` is not allowed."""
    format: Format = "auto"
    """How a row is laid out; auto looks at the columns of the first 100 rows and says what it found."""

    @property
    def label(self) -> str:
        """The source's name in row ids."""
        return self.path.name


class PydocSource(_SourceFields):
    """Instruction rows made from the documentation of the Python that runs this."""

    source: Literal["pydoc"]
    """Rows made here, from docstrings of the standard library."""
    format: Literal["messages"] = "messages"
    """These rows are messages."""

    @property
    def label(self) -> str:
        """The source's name in row ids."""
        return "pydoc"


Source = Annotated[HubSource | LocalSource | PydocSource, Discriminator("source")]


class Ingest(Section):
    """How strict reading is."""

    max_refused_fraction: Fraction = 0.01
    """Stop (exit 3) where a larger share of all rows cannot be read as their format."""


class Filter(Section):
    """Which rows are kept; every other row goes to rejects.parquet with its reason."""

    max_length_tokens: Count | None = None
    """Leave out rows with more tokens of the base's tokenizer; null keeps any length."""
    count: Literal["raw", "rendered"] = "raw"
    """Count the bare text of the turns, or the row as the chat template writes it."""
    min_user_characters: Annotated[int, Field(ge=0)] = 1
    """Leave out rows whose user turns have fewer characters together."""
    max_user_characters: Count | None = None
    """Leave out rows whose user turns have more characters together; null sets no limit."""
    min_assistant_characters: Annotated[int, Field(ge=0)] = 1
    """Leave out rows whose assistant turns have fewer characters together."""
    max_assistant_characters: Count | None = None
    """Leave out rows whose assistant turns have more characters together; null sets no limit."""
    alternate: bool = True
    """Leave out conversations in which user and assistant do not take turns, or the assistant is not last."""
    drop_matching: list[Pattern] = []
    """Leave out rows in which one of these regular expressions is found in any turn."""
    keep_matching: list[Pattern] = []
    """Keep only rows in which one of these regular expressions is found; an empty list keeps all."""

    @model_validator(mode="after")
    def _some_row_can_pass(self) -> Self:
        sides = (
            ("user", self.min_user_characters, self.max_user_characters),
            ("assistant", self.min_assistant_characters, self.max_assistant_characters),
        )
        refuse(
            [
                ((f"max_{who}_characters",), f"{most} is under min_{who}_characters {least}: no row would be kept")
                for who, least, most in sides
                if most is not None and most < least
            ]
        )
        return self


class Dedup(Section):
    """Exact duplicates, then near-duplicates by cosine."""

    exact: bool = True
    """Drop rows whose text is the same but for case and white space."""
    embedding: Annotated[str, Field(min_length=1)] | None = "lsa"
    """What makes the vectors: lsa (made of the rows, here), a model on the Hub, a folder; null: no near-duplicates."""
    field: Literal["instruction", "output", "both"] = "output"
    """Which text is compared: the user's, the assistant's, or all."""
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Cosine from which two rows are near-duplicates; no two kept rows reach it."""
    keep: Annotated[str, Field(pattern=KEEP)] = "longest"
    """Which row of several stays: longest, first, or column:NAME for the largest figure in a column."""
    max_dropped_fraction: Fraction = 0.9
    """Stop (exit 3) where a larger share of the rows would be dropped."""

    @field_validator("embedding")
    @classmethod
    def _can_be_a_folder(cls, embedding: str | None) -> str | None:
        if embedding and is_folder_name(embedding):
            local_path(embedding)
        return embedding


class Decontaminate(Section):
    """Drop training rows that share text with evaluation data."""

    against: Annotated[list[Source], Field(min_length=1)]
    """The evaluation data: sources as under `data`."""
    ngram: Annotated[int, Field(ge=5, le=50)] = 13
    """Words in a row that must be shared for a training row to be dropped."""


class Sample(Section):
    """Which of the curated rows are used: all of them, n at random, or the k with most tokens."""

    top_k: Count | None = None
    """Use this many rows, those with most tokens."""
    random: Count | None = None
    """Use this many rows, chosen by a hash of seed and row id."""

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.top_k and self.random:
            raise ValueError("top_k and random are two different rules: keep one")
        return self


class Split(Section):
    """The held-out share, taken by whole near-duplicate groups."""

    eval_fraction: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    """Share of the rows that is held out, at most."""
    max_eval_rows: Count = 1000
    """Rows that are held out, at most."""
    group_threshold: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Cosine from which two rows stay on the same side."""
