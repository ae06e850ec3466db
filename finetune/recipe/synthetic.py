"""Recipe section of rows written by a language model.

The sentence below a field is its documentation, as in recipe/data.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, model_validator
from pydantic.json_schema import SkipJsonSchema

from finetune.recipe.data import Contradiction, Count, Fraction, NotNegative, Section, Source, used_once, with_path
from finetune.recipe.training import LanguageModel

# Requests of a row that passes every check: evol asks for instruction, comparison and answer; self-instruct for the
# kind of task and an instance, and for TASKS_A_REQUEST new instructions at a time.
TASKS_A_REQUEST = 4


class Generate(Section):
    """Instruction rows written by a language model from seed rows; they are ingested as one more source."""

    method: Literal["self_instruct", "evol_instruct", "answer"]
    """New tasks (arXiv:2212.10560), seeds made harder and varied (arXiv:2304.12244), or answers to the seeds."""
    model: LanguageModel
    """The writing model."""
    seeds: Annotated[list[Source], Field(min_length=1)]
    """Seed rows: sources as under `data`; an answer may be missing. self_instruct shows their answers to no one."""
    rows: Count | None = None
    """Rows to write, at most; null (not for self_instruct): one a seed for answer, one a seed and round for evol."""
    rounds: Annotated[int, Field(ge=1, le=100)] = 4
    """Rounds, each of which starts from the rows of those before it; answer has one."""
    samples: Annotated[int, Field(ge=1, le=64)] = 1
    """Answers asked for each prompt, of which `best` keeps one."""
    best: Literal["agreement", "judge"] = "agreement"
    """Which of several answers is kept: the one most like the others (ROUGE-L), or the one the model judges best."""
    max_similarity: Annotated[float, Field(gt=0, le=1)] = 0.7
    """self_instruct: drop an instruction whose ROUGE-L with a kept one reaches this."""
    temperature: NotNegative = 0.7
    """Sampling temperature; verdicts are asked at 0."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Sample from the likeliest tokens with this probability together."""
    max_new_tokens: Count = 1024
    """Tokens of a response, at most; a row whose text was cut there is dropped."""
    prompts: str | None = None
    """A folder next to the recipe whose .jinja files replace those of the same name in recipes/prompts."""
    max_requests: Count | None = None
    """Stop (exit 3) after this many requests, kept responses included; the rows so far are written. Null: no limit."""
    max_tokens: Count | None = None
    """Stop (exit 3) after this many tokens of prompts and responses, kept ones included. Null: no limit."""
    max_refused_fraction: Fraction = 0.01
    """Stop (exit 2) if a larger share of the seeds does not fit."""
    prompts_path: SkipJsonSchema[Annotated[Path | None, Field(exclude=True)]] = None

    @model_validator(mode="before")
    @classmethod
    def _prompts_folder(cls, value: object, info: ValidationInfo) -> object:
        return with_path(value, info, "prompts", "prompts_path", how="the folder as prompts: NAME")

    def _contradictions(self) -> Iterator[Contradiction]:
        if self.method == "self_instruct" and self.rows is None:
            yield ("rows",), "missing; self_instruct needs the number of rows to write"
        if self.samples > 1 and self.temperature == 0:
            yield ("samples",), f"at temperature 0 all {self.samples} answers are the same; raise it, or set samples: 1"
        if self.samples > 1 and self.method == "self_instruct":
            yield ("samples",), "self_instruct writes its answers with the task; remove it"
        # The rows of other methods depend on the number of seeds, which is counted in plan (synth/forecast.py).
        least = self.requests_of(self.rows or 0) if self.method == "self_instruct" else 1
        for name, limit in (("max_requests", self.max_requests), ("max_tokens", self.max_tokens)):
            if limit is not None and limit < least:
                yield (name,), f"{limit:,} is less than the {least:,} requests that {self.rows} rows take at least"
        for number, source in enumerate(self.seeds):
            if source.format in ("preference", "kto"):
                yield ("seeds", number, "format"), f"rows of format {source.format} belong under preference.data"
        yield from used_once(("seeds",), self.seeds, "seeds")

    @property
    def answer_requests(self) -> int:
        """Requests that one answer takes."""
        return self.samples + (2 * (self.samples - 1) if self.best == "judge" else 0)

    def most_rows(self, seeds: int | None) -> int | None:
        """Return the rows that so many seeds give at most; None if that depends on seeds which are not counted."""
        if self.method == "self_instruct":
            return self.rows
        possible = None if seeds is None else seeds * (1 if self.method == "answer" else self.rounds)
        counts = [count for count in (self.rows, possible) if count is not None]
        return min(counts, default=None)

    def requests_of(self, rows: int) -> int:
        """Return the requests that `rows` rows take if every candidate passes every check."""
        match self.method:
            case "answer":
                return rows * self.answer_requests
            case "evol_instruct":
                return rows * (2 + self.answer_requests)
            case _:
                return 2 * rows + -(-rows // TASKS_A_REQUEST)

    @property
    def unlimited(self) -> Generate:
        """This section without what changes no row: limits, speed, the prompts' folder. It enters the key."""
        quiet = {name: None for name in ("max_requests", "max_tokens", "prompts")}
        return self.model_copy(update={**quiet, "model": self.model.without_speed})
