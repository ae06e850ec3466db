"""The recipe's filter section and its rules by name.

The string below a field is its documentation, as in `recipe/data.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, ValidationInfo, model_validator
from pydantic.json_schema import SkipJsonSchema

from finetune.recipe.data import LANGUAGE, OWN, Contradiction, Count, Fraction, Pattern, Section, refuse

Language = Annotated[str, Field(pattern=LANGUAGE)]
CONDITION = re.compile(r"\s*([^<>=!\s].*?)\s*(>=|<=|==|!=|>|<|=)\s*(.*?)\s*")


def parse_condition(text: str) -> tuple[str, str, str]:
    """Return (column, operator, value) of `rating >= 4`; a single = means ==. Raises ValueError for another form."""
    match = CONDITION.fullmatch(text)
    if match is None:
        raise ValueError("a condition is COLUMN OPERATOR VALUE, as in rating >= 4; operators: >= <= > < == !=")
    column, sign, value = match.groups()
    sign = "==" if sign == "=" else sign
    if sign not in ("==", "!="):
        try:
            float(value)
        except ValueError:
            raise ValueError(f"{sign} compares numbers, found {value!r}; == and != compare texts") from None
    return column, sign, value.strip("'\"") if sign in ("==", "!=") else value


def _is_condition(text: str) -> str:
    parse_condition(text)
    return text


Condition = Annotated[str, AfterValidator(_is_condition)]


class Turns(Section):
    """Number of turns of a conversation; a system turn is not counted."""

    rule: Literal["turns"]
    """Drop conversations that are too short or too long."""
    min_turns: Count = 1
    """Fewest turns."""
    max_turns: Count | None = 40
    """Most turns; null sets no limit."""

    def _contradictions(self) -> Iterator[Contradiction]:
        if self.max_turns is not None and self.max_turns < self.min_turns:
            yield ("max_turns",), f"{self.max_turns} is under min_turns {self.min_turns}: no row would be kept"


class Repetition(Section):
    """Repeated lines or words in an answer; after Rae et al. 2021 (Gopher), table A1."""

    rule: Literal["repetition"]
    """Drop repetitive answers."""
    max_duplicate_lines: Fraction = 0.3
    """Largest share of lines and sentences (20 letters or more) that repeat an earlier one."""
    max_top_ngram: Fraction = 0.5
    """Largest share of the characters in one repeated n-gram of two to four words."""
    min_words: Count = 50
    """Answers with fewer words are kept."""


class Symbols(Section):
    """Share of symbols and digits in an answer."""

    rule: Literal["symbols"]
    """Drop answers that are mostly symbols or digits."""
    max_symbols: Fraction = 0.6
    """Largest share of the characters (spaces not counted) that are neither letters nor digits."""
    max_digits: Fraction = 0.6
    """Largest share of the characters (spaces not counted) that are digits."""
    min_characters: Count = 100
    """Answers with fewer characters (spaces not counted) are kept."""


class Refusals(Section):
    """Answers that refuse, or say "as an AI language model"; the list of phrases is in finetune/filters/endings.py."""

    rule: Literal["refusals"]
    """Drop refusals and boilerplate of other assistants."""
    phrases: list[Annotated[str, Field(min_length=3)]] = []
    """More phrases for which an answer is dropped, anywhere in it, in any case."""


class Truncated(Section):
    """An answer that ends in a code block or in mid-sentence."""

    rule: Literal["truncated"]
    """Drop answers that are cut off."""
    min_characters: Count = 200
    """Shorter answers are only checked for an open code block."""


class Echo(Section):
    """An answer that repeats the user's turn."""

    rule: Literal["echo"]
    """Drop answers equal to the turn before them except for case and white space."""


class Links(Section):
    """URLs and e-mail addresses in an answer."""

    rule: Literal["links"]
    """Drop answers that are mostly links."""
    max_share: Fraction = 0.6
    """Largest share of the characters (spaces not counted) in URLs and e-mail addresses."""


class LanguageRule(Section):
    """The language of the answers, by py3langid (the extra `language`); fenced code and links are left out."""

    rule: Literal["language"]
    """Drop answers in other languages."""
    languages: Annotated[list[Language], Field(min_length=1)]
    """The languages to keep, as ISO 639-1 codes: [en, de]."""
    min_confidence: Fraction = 0.8
    """Drop only if the detector's probability of another language is at least this."""
    min_characters: Count = 60
    """Answers with fewer letters are kept."""


class Own(Section):
    """A user-defined rule, {rule: "module:function"}; the function takes the row (finetune.data.records.Example)."""

    rule: Literal["own"]
    """Drop rows for which the function returns a reason (a text) instead of None."""
    function: Annotated[str, Field(pattern=OWN)]
    """MODULE:FUNCTION; the module is a file in the recipe's folder or installed."""
    folder: SkipJsonSchema[Annotated[Path | None, Field(exclude=True)]] = None

    @model_validator(mode="before")
    @classmethod
    def _beside_the_recipe(cls, value: object, info: ValidationInfo) -> object:
        if not isinstance(value, dict) or not info.context:
            return value
        if "folder" in value:
            why = "unknown field; a module is searched next to the recipe, then among installed packages"
            refuse([(("folder",), why)])
        return {**value, "folder": Path(info.context.get("folder", ".")).absolute()}


def _in_full(value: object) -> object:
    """Expand a bare name to a rule with its defaults, and MODULE:FUNCTION to a user-defined rule."""
    rule = value if isinstance(value, str) else value.get("rule") if isinstance(value, dict) else None
    if not isinstance(rule, str):
        return value
    rest = value if isinstance(value, dict) else {}
    return {**rest, "rule": "own", "function": rule} if ":" in rule else {**rest, "rule": rule}


Rule = Annotated[
    Turns | Repetition | Symbols | Refusals | Truncated | Echo | Links | LanguageRule | Own,
    Discriminator("rule"),
    BeforeValidator(_in_full),
]
RULES = ("turns", "repetition", "symbols", "refusals", "truncated", "echo", "links", "language", "own")


class Filter(Section):
    """Rules for keeping rows; every other row goes to rejects.parquet with its reason."""

    max_length_tokens: Count | None = None
    """Drop rows with more tokens of the base's tokenizer; null sets no limit."""
    min_length_tokens: Count | None = None
    """Drop rows with fewer tokens of the base's tokenizer; null sets no limit."""
    count: Literal["raw", "rendered"] = "raw"
    """Count tokens of the bare text of the turns, or of the row as the chat template renders it."""
    min_user_characters: Annotated[int, Field(ge=0)] = 1
    """Drop rows whose user turns have fewer characters in total."""
    max_user_characters: Count | None = None
    """Drop rows whose user turns have more characters in total; null sets no limit."""
    min_assistant_characters: Annotated[int, Field(ge=0)] = 1
    """Drop rows whose assistant turns have fewer characters in total."""
    max_assistant_characters: Count | None = None
    """Drop rows whose assistant turns have more characters in total; null sets no limit."""
    alternate: bool = True
    """Drop conversations in which user and assistant do not alternate, or the assistant is not last."""
    drop_matching: list[Pattern] = []
    """Drop rows in which one of these regular expressions matches in any turn."""
    keep_matching: list[Pattern] = []
    """Keep only rows in which one of these regular expressions matches; an empty list keeps all."""
    keep_where: list[Condition] = []
    """Keep only rows whose other columns meet every condition, as in ["rating >= 4", "channel == mail"]."""
    rules: list[Rule] = []
    """Rules by name, in order; a bare name takes the defaults, as in [refusals, {rule: links, max_share: 0.3}]."""

    def _contradictions(self) -> Iterator[Contradiction]:
        for what in ("length_tokens", "user_characters", "assistant_characters"):
            least, most = getattr(self, f"min_{what}") or 0, getattr(self, f"max_{what}")
            if most is not None and most < least:
                yield (f"max_{what}",), f"{most} is under min_{what} {least}: no row would be kept"
        names = [rule.function if isinstance(rule, Own) else rule.rule for rule in self.rules]
        for number, name in enumerate(names):
            if name in names[:number]:
                yield ("rules", number), f"{name} is listed twice; keep one"
