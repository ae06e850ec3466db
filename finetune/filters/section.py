"""The recipe's filter section as one function of a row, token counts apart."""

from __future__ import annotations

import re
from collections.abc import Callable

from finetune.data.records import Example
from finetune.filters import basic
from finetune.recipe.filters import Filter


def rules_of(rules: Filter) -> Callable[[Example], basic.Verdict]:
    """All rules but the token count as one function: the first that leaves a row out names the reason."""
    from finetune.filters import conditions, custom, language
    from finetune.filters.registry import check_of

    drop = [re.compile(p) for p in rules.drop_matching]
    keep = [re.compile(p) for p in rules.keep_matching]
    users = (rules.min_user_characters, rules.max_user_characters)
    answers = (rules.min_assistant_characters, rules.max_assistant_characters)
    checks: list[Callable[[Example], basic.Verdict]] = [
        basic.empty_turn,
        basic.no_assistant,
        *([basic.not_alternating] if rules.alternate else []),
        lambda row: basic.length_outside(row, "user", *users),
        lambda row: basic.length_outside(row, "assistant", *answers),
        lambda row: basic.matching(row, drop, keep),
        *([conditions.check_of(rules.keep_where)] if rules.keep_where else []),
        *(check_of(rule, custom.load, language.detector) for rule in rules.rules),
    ]

    def judge(row: Example) -> basic.Verdict:
        return next((verdict for check in checks if (verdict := check(row)) is not None), None)

    return judge
