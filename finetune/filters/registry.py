"""Build row checks from a recipe's filter section; token counts are left to the stage."""

from __future__ import annotations

import re
from collections.abc import Callable

from finetune.data.records import Example
from finetune.errors import InputError
from finetune.filters import basic, conditions, custom, endings, language, quality
from finetune.filters.basic import Drop
from finetune.recipe.filters import (
    Echo,
    Filter,
    LanguageRule,
    Links,
    Own,
    Refusals,
    Repetition,
    Rule,
    Symbols,
    Truncated,
    Turns,
)

Check = Callable[[Example], basic.Verdict]
OwnFunction = Callable[[Example], object]
MOST_SHOWN = 200  # characters of a reason from a user-defined function


def rules_of(rules: Filter) -> Check:
    """All rules but the token count as one function: the first that leaves a row out names the reason."""
    drop = [re.compile(p) for p in rules.drop_matching]
    keep = [re.compile(p) for p in rules.keep_matching]
    users = (rules.min_user_characters, rules.max_user_characters)
    answers = (rules.min_assistant_characters, rules.max_assistant_characters)
    checks: list[Check] = [
        basic.empty_turn,
        basic.no_assistant,
        *([basic.not_alternating] if rules.alternate else []),
        lambda row: basic.length_outside(row, "user", *users),
        lambda row: basic.length_outside(row, "assistant", *answers),
        lambda row: basic.matching(row, drop, keep),
        *([conditions.check_of(rules.keep_where)] if rules.keep_where else []),
        *(check_of(rule) for rule in rules.rules),
    ]

    def judge(row: Example) -> basic.Verdict:
        return next((verdict for check in checks if (verdict := check(row)) is not None), None)

    return judge


def check_of(rule: Rule) -> Check:
    """Return the rule as a function of a row. Raises InputError for a user's function that cannot be loaded."""
    match rule:
        case Turns():
            return lambda row: quality.turns(row, rule.min_turns, rule.max_turns)
        case Repetition():
            return lambda row: quality.repetition(row, rule.max_duplicate_lines, rule.max_top_ngram, rule.min_words)
        case Symbols():
            return lambda row: quality.symbols(row, rule.max_symbols, rule.max_digits, rule.min_characters)
        case Refusals():
            return lambda row: endings.refusals(row, rule.phrases)
        case Truncated():
            return lambda row: endings.truncated(row, rule.min_characters)
        case Echo():
            return quality.echo
        case Links():
            return lambda row: quality.links(row, rule.max_share)
        case LanguageRule():
            detect = language.detector(rule.languages)
            return lambda row: quality.language(row, rule.languages, rule.min_confidence, rule.min_characters, detect)
        case Own():
            return own_check(rule.function, custom.load(rule))


def own_check(name: str, function: OwnFunction) -> Check:
    """Wrap a user-defined function as a rule. Raises InputError with the row id unless it returns None or a reason."""

    def check(row: Example) -> basic.Verdict:
        try:
            reason = function(row)
        except Exception as error:  # user code may raise anything
            raise InputError(f"filter rule {name}: row {row.id}: it raised {type(error).__name__}: {error}") from error
        if reason is None:
            return None
        if not isinstance(reason, str) or not reason.strip():
            raise InputError(
                f"filter rule {name}: row {row.id}: found {reason!r:.60}; allowed: None (keep the row) or a reason"
            )
        text = reason.strip()[:MOST_SHOWN].encode("utf-8", "backslashreplace").decode()
        return Drop(name, text)

    return check
