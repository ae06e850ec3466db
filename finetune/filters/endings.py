"""Filter rules for refusals, assistant boilerplate and truncated answers."""

from __future__ import annotations

import re
from collections.abc import Sequence

from finetune.data.records import Example
from finetune.filters.basic import Drop
from finetune.filters.quality import fences

# As of November 2026. Boilerplate counts anywhere in an answer: it shows which model wrote it.
BOILERPLATE = (
    "as an ai language model",
    "as a large language model",
    "as a language model",
    "as an ai assistant, i ",
    "as an ai, i ",
    "i am an ai language model",
    "i'm an ai language model",
    "i'm just an ai",
    "i am just an ai",
    "i'm only an ai",
    "my knowledge cutoff",
    "my training data only",
    "trained by openai",
    "developed by openai",
    "openai's content policy",
    "openai's use case policy",
    "violates my programming",
    "goes against my programming",
)
# Refusals count at the beginning of an answer only: later they may be quoted speech.
REFUSALS = (
    "i cannot fulfill",
    "i can't fulfill",
    "i cannot assist with",
    "i can't assist with",
    "i cannot help with that",
    "i can't help with that",
    "i cannot comply with",
    "i can't comply with",
    "i cannot provide you with",
    "i'm sorry, but i can",
    "i am sorry, but i can",
    "i'm sorry, i can",
    "i am sorry, i can",
    "sorry, but i can't",
    "sorry, i can't",
    "sorry, i cannot",
    "i apologize, but i can",
    "i'm unable to assist",
    "i'm unable to help",
    "i'm unable to provide",
    "i am unable to assist",
    "i am unable to help",
    "i am unable to provide",
    "i'm not able to assist",
    "i'm not able to help",
    "i'm not able to provide",
    "i am not able to assist",
    "i am not able to help",
    "i am not able to provide",
    "i'm not comfortable",
    "i must decline",
)
OPENING_CHARACTERS = 200
STRAIGHT = str.maketrans("’‘“”", "''\"\"")
ABOUT_AI = re.compile(
    r"\b(?:AI|A\.I\.|artificial intelligence|language model|(?:chat)?bot|ChatGPT|OpenAI|GPT-\d)\b", re.I
)

SPECIAL = re.compile(r"(?:<\|[^|<>]{1,40}\|>|</s>|<eos>|\s)+\Z")
# End of a sentence: Latin, CJK, Devanagari, Arabic, Ethiopic, Armenian; closing quotes and brackets may follow. Two
# letters must precede the stop, or "U.S." would end one.
STOPS = ".!?…。！？｡।॥؟۔։።"
CLOSING = "\"'”’»›)]}*_`」』】）〉》"
SENTENCE = re.compile(rf"\w\w[{STOPS}][{re.escape(CLOSING)}]*(?=\s|\Z)|[。！？｡]")
LIST_ITEM = re.compile(r"\s*(?:[-*+•·–—#>|]|\(?(?:\d{1,3}|[a-zA-Z]|[ivxIVX]{1,5})[.):\]])\s?|\s*\w[^:\n]{0,40}:\s")
# Words that no complete English text ends with.
OPEN_WORDS = frozenset(
    "a an the and or but because although while if than that which who whose of to from with without into onto upon "
    "between among during for by as at is are was were be been has have had will would can could should may might must "
    "their its his her your our my these those such very".split()
)
CODE = re.compile(
    r"[{};=<>|\\$]|\w\(|\w\.\w+\(|^\s*(?:def|class|import|from|return|print|for|while|if|SELECT|FROM)\b|://"
)
SIGNATURE = re.compile(r", [^\W\d_a-z]")  # "Yours in hope, Your companion"
OPEN_MARKS = ",;–—("
LEAST_WORDS = 6  # in the last line
LONG_CHARACTERS = 600  # truncated texts are mostly long; a short one may just lack the last full stop


def refusals(row: Example, phrases: Sequence[str]) -> Drop | None:
    """Drop a row whose assistant turn refuses, calls itself a language model, or has one of `phrases`.

    If a user or system turn mentions an AI first, the answer may do so too. Text in double quotes is ignored.
    """
    asked = any(ABOUT_AI.search(m.content) for m in row.messages if m.role in ("user", "system"))
    known = (*map(plain, phrases), *(() if asked else BOILERPLATE))
    for number, message in enumerate(row.messages, start=1):
        if message.role != "assistant":
            continue
        text = plain(message.content)
        opening = text[:OPENING_CHARACTERS]
        phrase = next((p for p in known if (at := text.find(p)) >= 0 and text.count('"', 0, at) % 2 == 0), None)
        phrase = phrase or next((p for p in REFUSALS if p in opening), None)
        if phrase is not None:
            return Drop("refusals", f"turn {number} says {phrase!r}")
    return None


def plain(text: str) -> str:
    """Return `text` case-folded, with straight quotes and single spaces, like the phrases."""
    return " ".join(text.casefold().translate(STRAIGHT).split())


def truncated(row: Example, min_characters: int) -> Drop | None:
    """Drop a row whose last answer stops inside a code block or inside a sentence.

    The second is a heuristic, applied only if the text is at least `min_characters` long, has two sentences that end in
    a full stop or equivalent, and its last line is prose (no code, no list item, six words or more). Scripts without
    full stops are never judged.
    """
    answers = [row.text] if row.text is not None else [m.content for m in row.messages if m.role == "assistant"]
    if not answers:
        return None
    text = SPECIAL.sub("", answers[-1])
    blocks = list(fences(text))
    if blocks and blocks[-1][1] is None:
        return Drop("truncated", f"the code block at character {blocks[-1][0]} is never closed")
    if len(text) < min_characters or not inside_sentence(text):
        return None
    return Drop("truncated", f"it ends in mid-sentence: {text[-60:]!r}", len(text), min_characters)


def inside_sentence(text: str) -> bool:
    """Return whether a text (no trailing blanks) whose sentences end with stops breaks off inside one.

    It does if it ends in a comma or in a word like "the" or "of"; a long text also if other words follow its last stop
    that cannot be a title, signature, name or tag: three words or more, the last one in lower case.
    """
    if not (text[-1].isalpha() or text[-1] in OPEN_MARKS):
        return False
    last = text.rpartition("\n")[2]
    words = last.split()
    if len(words) < LEAST_WORDS or CODE.search(last):
        return False
    if sum(1 for _ in zip(SENTENCE.finditer(text), range(2), strict=False)) < 2:
        return False
    if text[-1] in OPEN_MARKS or words[-1].lower() in OPEN_WORDS:
        return True
    *_, stop = [None, *SENTENCE.finditer(last)]
    if len(text) < LONG_CHARACTERS or LIST_ITEM.match(last) or stop is None:
        return False
    rest = last[stop.end() :].split()
    return len(rest) >= 3 and rest[-1].islower() and rest[-1][0].isalpha() and not SIGNATURE.search(" ".join(rest))
