"""Filter rules on the content of a row. Each returns None to keep it, or a Drop with value and limit.

They measure the assistant's turns, because those are trained on; a raw text is measured as a whole.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from finetune.data.records import Example
from finetune.data.text import normalised
from finetune.filters.basic import Drop

Detect = Callable[[str], tuple[str, float]]
"""Function from a text to its ISO 639-1 language code and a probability from 0 to 1."""

NGRAMS = (2, 3, 4)
LINE_LETTERS = 20  # a shorter line ("}", "return False") repeats in good code and good tables
LINE_END = re.compile(r"\n|(?<=[.!?])\s+|(?<=[。！？])")
FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})([^\n]*)$", re.M)
RULING = re.compile(r"^[ \t]*[-+=|:~_*]{3}[-+=|:~_* \t]*$", re.M)
# A run of letters and digits; in scripts without spaces each letter is a word.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
# Both are anchored at the start of a run and have bounded parts, so no text makes them slow.
LINK = re.compile(
    r"(?<![\w.])(?:https?://|ftp://|www\.)[^\s<>\"')\]]+"
    r"|(?<![\w.+-])[\w.+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,8}"
)


def turns(row: Example, least: int, most: int | None) -> Drop | None:
    """Drop a row with fewer or more turns than allowed, a system turn not counted. A raw text is kept."""
    if row.text is not None:
        return None
    count = sum(m.role != "system" for m in row.messages)
    if count < least:
        return Drop("turns", f"{count} turns, at least {least}", count, least)
    if most is not None and count > most:
        return Drop("turns", f"{count} turns, at most {most}", count, most)
    return None


def repetition(row: Example, max_duplicate_lines: float, max_top_ngram: float, min_words: int) -> Drop | None:
    """Drop a row that repeats the same lines, or the same two to four words.

    After two of the MassiveText rules (Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from
    Training Gopher", table A1). Those are for web pages, and answers are short: here a sentence counts as a line, and
    lines of fewer than twenty letters and texts of fewer than `min_words` words are ignored.
    """
    text = row.joined("assistant")
    words = WORD.findall(text.casefold())
    if len(words) < min_words:
        return None
    share = duplicate_lines(text)
    if share > max_duplicate_lines:
        return _above("repetition", "of the lines and sentences repeat an earlier one", share, max_duplicate_lines)
    share, ngram = top_ngram(words) if _most_repeated(words) > max_top_ngram else (0.0, ())
    if share > max_top_ngram:
        phrase = " ".join(ngram)[:60]
        return _above("repetition", f"of the characters are {phrase!r} repeated", share, max_top_ngram)
    return None


def duplicate_lines(text: str) -> float:
    """Return the share of the lines and sentences with twenty letters or more that repeat an earlier one."""
    lines = [line for raw in LINE_END.split(text) if sum(map(str.isalpha, line := raw.strip())) >= LINE_LETTERS]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0


def top_ngram(words: Sequence[str]) -> tuple[float, tuple[str, ...]]:
    """Return the largest share of characters in one n-gram that occurs twice or more (n = 2, 3, 4), and the n-gram.

    Overlapping occurrences count once: "ha ha ha ha" has the pair twice.
    """
    total = sum(map(len, words))
    best: tuple[float, tuple[str, ...]] = 0.0, ()
    for n in NGRAMS:
        counts: Counter[tuple[str, ...]] = Counter()
        end: dict[tuple[str, ...], int] = {}
        for i, ngram in enumerate(zip(*(words[k:] for k in range(n)), strict=False)):
            if end.get(ngram, 0) <= i:
                counts[ngram] += 1
                end[ngram] = i + n
        shares = ((count * sum(map(len, g)) / total, g) for g, count in counts.items() if count > 1)
        best = max(best, max(shares, default=best), key=lambda pair: pair[0])  # the shortest on a tie
    return best


def _most_repeated(words: Sequence[str]) -> float:
    """Return an upper bound of any n-gram's share: occurrences do not overlap, so they contain each word at most as
    often as the text does. It makes counting n-grams unnecessary for nearly every text.
    """
    counts = Counter(words)
    total = sum(len(word) * count for word, count in counts.items())
    return sum(sorted(len(word) * count for word, count in counts.items())[-max(NGRAMS) :]) / total


def symbols(row: Example, max_symbols: float, max_digits: float, min_characters: int) -> Drop | None:
    """Drop a row if too many characters, spaces not counted, are symbols or digits.

    A combining mark belongs to its letter, so scripts with marks are not counted as symbols. Ruling lines of tables and
    headings are ignored.
    """
    text = RULING.sub("", row.joined("assistant"))
    counts = {c: n for c, n in Counter(text).items() if not c.isspace()}
    total = sum(counts.values())
    if total < min_characters:
        return None
    digits = sum(n for c, n in counts.items() if c.isdigit()) / total
    if digits > max_digits:
        return _above("symbols", "of the characters are digits", digits, max_digits)
    share = sum(n for c, n in counts.items() if not c.isalnum() and unicodedata.category(c)[0] != "M") / total
    if share > max_symbols:
        return _above("symbols", "of the characters are neither letters nor digits", share, max_symbols)
    return None


def links(row: Example, max_share: float) -> Drop | None:
    """Drop a row if too many characters, spaces not counted, belong to URLs and e-mail addresses."""
    text = row.joined("assistant")
    if not any(mark in text for mark in ("@", "://", "www.")):
        return None
    total = sum(map(len, text.split()))
    share = sum(len(link) for link in LINK.findall(text)) / max(1, total)
    if share > max_share:
        return _above("links", "of the characters are URLs or e-mail addresses", share, max_share)
    return None


def echo(row: Example) -> Drop | None:
    """Drop a row whose answer equals the user's turn before it except for case, white space and Unicode form."""
    for number, (asked, answer) in enumerate(zip(row.messages, row.messages[1:], strict=False), start=2):
        if (asked.role, answer.role) == ("user", "assistant") and answer.content.strip():
            if normalised(asked.content) == normalised(answer.content):
                return Drop("echo", f"turn {number} repeats the turn before it: {answer.content.strip()[:60]!r}")
    return None


def language(
    row: Example, allowed: Sequence[str], min_confidence: float, min_characters: int, detect: Detect
) -> Drop | None:
    """Drop a row whose answers are in another language with at least the given probability.

    Fenced code, links and non-letters are removed first; fewer than `min_characters` letters are not judged.
    """
    text = LINK.sub(" ", without_code(row.joined("assistant")))
    if sum(map(str.isalpha, text)) < min_characters:
        return None
    code, confidence = detect(text)
    if code in allowed or confidence < min_confidence:
        return None
    return Drop(
        "language", f"{code} ({confidence:.2f}), allowed is {', '.join(allowed)}", round(confidence, 6), min_confidence
    )


def without_code(text: str) -> str:
    """Return `text` without fenced code; an unclosed fence extends to the end."""
    kept, position = [], 0
    for start, end in fences(text):
        kept.append(text[position:start])
        position = len(text) if end is None else end
    return "\n".join([*kept, text[position:]])


def fences(text: str) -> Iterable[tuple[int, int | None]]:
    """Yield begin and end (None: unclosed) of each fenced block, as in CommonMark 0.31, section 4.5.

    A block is closed by at least as many of the same mark, with nothing after them. Unlike there, a fence may be
    indented by any number of blanks (in lists, for example), and a line of tildes right below a text underlines a
    heading, as in reStructuredText.
    """
    opened: re.Match[str] | None = None
    for mark in FENCE.finditer(text):
        if opened is None:
            above = text[text.rfind("\n", 0, max(0, mark.start() - 1)) + 1 : max(0, mark.start() - 1)]
            if mark[1][0] == "~":
                opened = None if above.strip() and not mark[2].strip() else mark
            elif "`" not in mark[2]:  # ```x``` in one line is code inside a sentence
                opened = mark
        elif mark[1].startswith(opened[1]) and not mark[2].strip():
            yield opened.start(), mark.end()
            opened = None
    if opened is not None:
        yield opened.start(), None


def _above(rule: str, what: str, share: float, limit: float) -> Drop:
    return Drop(rule, f"{share:.1%} {what}, at most {limit:.1%}", round(share, 6), limit)
