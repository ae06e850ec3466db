"""Answers that are no answers: refusals, assistant boilerplate, and texts that stop before their end."""

from __future__ import annotations

import re
from collections.abc import Sequence

from finetune.data.records import Example
from finetune.filters.basic import Drop
from finetune.filters.quality import fences

# As of November 2026. Boilerplate counts anywhere in an answer: it tells of what wrote it, not of the question.
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
# Refusals count where they open an answer: later on, somebody in a story may say them.
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
# A sentence ends so: Latin, CJK, Devanagari, Arabic, Ethiopic, Armenian; quotes and brackets may close behind it. Two
# letters stand before the stop, or "U.S." would end one.
STOPS = ".!?…。！？｡।॥؟۔։።"
CLOSING = "\"'”’»›)]}*_`」』】）〉》"
SENTENCE = re.compile(rf"\w\w[{STOPS}][{re.escape(CLOSING)}]*(?=\s|\Z)|[。！？｡]")
LIST_ITEM = re.compile(r"\s*(?:[-*+•·–—#>|]|\(?(?:\d{1,3}|[a-zA-Z]|[ivxIVX]{1,5})[.):\]])\s?|\s*\w[^:\n]{0,40}:\s")
# What no finished English text ends in.
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
LEAST_WORDS = 6  # of the last line
LONG_CHARACTERS = 600  # what is cut off is mostly long; a short text may simply have no last full stop


def refusals(row: Example, phrases: Sequence[str]) -> Drop | None:
    """An assistant turn that refuses, or that speaks of itself as a language model; or that has one of `phrases`.

    Where the user or the system turn speaks of an AI first, the answer may too. What stands in double quotes is quoted.
    """
    asked = any(ABOUT_AI.search(m.content) for m in row.messages if m.role in ("user", "system"))
    known = (*map(plain, phrases), *(() if asked else BOILERPLATE))
    for number, message in enumerate(row.messages, start=1):
        if message.role != "assistant":
            continue
        said = plain(message.content)
        opening = said[:OPENING_CHARACTERS]
        found = next((p for p in known if (at := said.find(p)) >= 0 and said.count('"', 0, at) % 2 == 0), None)
        found = found or next((p for p in REFUSALS if p in opening), None)
        if found is not None:
            return Drop("refusals", f"turn {number} says {found!r}")
    return None


def plain(text: str) -> str:
    """Folded, with straight quotes and single spaces, as the phrases are written."""
    return " ".join(text.casefold().translate(STRAIGHT).split())


def truncated(row: Example, min_characters: int) -> Drop | None:
    """The last answer stops inside a block of code, or inside a sentence.

    The second is a guess, and made only where the text shows how it ends its sentences: it is at least `min_characters`
    long, has two sentences that end in a full stop or its like, and its last line is prose (no code, no list item, six
    words or more). A text of a script without full stops is never judged.
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
    """Whether a text (no blanks at its end) that ends its sentences with stops breaks off inside one.

    It does where it ends in a comma or in a word like "the" or "of". A long text also does where other words follow its
    last stop, if they can be no title, signature, name or tag: three words or more, the last of them in small letters.
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
