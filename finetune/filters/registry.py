"""Build row checks from a recipe's filter rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from finetune.data.records import Example
from finetune.errors import InputError
from finetune.filters import basic, endings, quality
from finetune.filters.basic import Drop
from finetune.recipe.filters import (
    Echo,
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


def check_of(
    rule: Rule, load: Callable[[Own], OwnFunction], detector: Callable[[Sequence[str]], quality.Detect]
) -> Check:
    """Return the rule as a function of a row.

    Args:
        rule: the rule with its limits.
        load: loads the function of a user-defined rule.
        detector: builds a language detector; its argument is the languages it must know.
    """
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
            return _language(rule, detector(rule.languages))
        case Own():
            return own_check(rule.function, load(rule))


def _language(rule: LanguageRule, detect: quality.Detect) -> Check:
    return lambda row: quality.language(row, rule.languages, rule.min_confidence, rule.min_characters, detect)


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
