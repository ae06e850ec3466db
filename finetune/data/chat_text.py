"""Texts that a chat template has written already, parsed back into turns if that is proved.

A row's `text` may hold a whole conversation with the control strings of some template. Learned as it stands it would
teach the model the user's words, and the strings of another model. Each notation is a pattern for the beginning of a
turn, with the ends that may follow; a text is taken apart by it, written again from the turns, and compared.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from finetune.data.records import Message
from finetune.data.turns import CALLS, READ_ROLES
from finetune.data.values import RowError

ROLE = r"(?P<role>[A-Za-z_]+)"
ENDS = r"(?P<end></s>|<\|end\|>|<\|endoftext\|>|<\|end_of_text\|>|<\|eot\|>|<\|eot_id\|>|<\|im_end\|>|<eos>)?"
BEGIN = r"(?:<s>|<bos>|<\|begin_of_text\|>|<\|startoftext\|>|<｜begin▁of▁sentence｜>|\[gMASK\]<sop>)?\s*"


@dataclass(frozen=True, slots=True)
class Notation:
    """How a family of templates writes turns: `start` begins one and names its role, `end` may close it.

    `loose` notations have no control tokens, only words at the start of a line or text: blanks around a turn belong to
    the notation, and a text counts as such only when it begins with a user's turn and holds an assistant's.
    """

    name: str
    start: str
    end: str = ENDS
    loose: bool = False


NOTATIONS = (
    Notation("ChatML", rf"<\|im_start\|>{ROLE}(?:\n|<\|im_sep\|>)", r"(?P<end><\|im_end\|>)?"),
    Notation(
        "Llama 3",
        rf"<\|start_header_id\|>{ROLE}<\|end_header_id\|>\n\n",
        r"(?P<end><\|(?:eot_id|eom_id|end_of_text)\|>)?",
    ),
    Notation("Llama 4", rf"<\|header_start\|>{ROLE}<\|header_end\|>\n\n", r"(?P<end><\|(?:eot|eom)\|>)?"),
    Notation("Gemma", rf"<start_of_turn>{ROLE}\n", r"(?P<end><end_of_turn>)?"),
    Notation("Granite", rf"<\|start_of_role\|>{ROLE}<\|end_of_role\|>", r"(?P<end><\|end_of_text\|>)?"),
    Notation(
        "Command R",
        r"<\|START_OF_TURN_TOKEN\|><\|(?P<role>[A-Z]+)_TOKEN\|>",
        r"(?P<end><\|END_OF_TURN_TOKEN\|>)?",
    ),
    Notation("DeepSeek", r"<｜(?P<role>User|Assistant)｜>", r"(?P<end><｜end▁of▁sentence｜>)?"),
    Notation("<|user|>", r"<\|(?P<role>system|user|assistant|human|bot|model|tool|observation)\|>\n?"),
    Notation(
        "### Human:",
        r"(?:^|(?<=\s)|(?<=\S))### ?(?P<role>Human|User|Assistant|System|Bot|AI)[ \t]*:",
        ENDS,
        loose=True,
    ),
    Notation(
        "Human:",
        r"(?:^|(?<=\n)|(?<=\s)(?=USER:|ASSISTANT:))[ \t]*(?P<role>Human|HUMAN|USER|User|ASSISTANT|Assistant):(?=\s)",
        ENDS,
        loose=True,
    ),
)
OTHER_ROLES = {"chatbot": "assistant", "ai": "assistant"}
# Whatever else looks like a template's control token. End-of-text marks alone make no chat.
CONTROL = re.compile(
    r"<\|(?!endoftext\||end_of_text\||begin_of_text\||startoftext\|)[\w.-]{1,40}\|>"
    r"|<｜(?!end▁of▁sentence|begin▁of▁sentence)[\w▁ ]{1,40}｜>"
    r"|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|\[/?(?:SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]"
)
ADVICE = (
    "a chat that can be taken apart and written again byte for byte; give the rows as messages, or learn the whole "
    "text, the user's words too, with format: text, raw: true on the source"
)
ALPACA_PREAMBLES = (
    "",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.",
)
ALPACA_START = re.compile(r"(?:<s>)?\s*(?P<preamble>[^#]*?)\s*(?=### Instruction:)")
ALPACA_TURN = re.compile(
    r"### Instruction:\s*\n(?P<instruction>.*?)(?:\n+### Input:\s*\n(?P<input>.*?))?"
    r"\n+### Response:[ \t]*\n?(?P<output>.*?)(?:</s>|<\|endoftext\|>)?\s*(?=### Instruction:|\Z)",
    re.S,
)
LLAMA2_START = re.compile(r"\s*(?:<s>\s*)?\[INST\]")
LLAMA2_TURN = re.compile(
    r"\s*(?:<s>\s*)?\[INST\](?P<user>.*?)\[/INST\](?P<answer>.*?)(?P<end></s>|(?=<s>|\[INST\])|\Z)", re.S
)
LLAMA2_SYSTEM = re.compile(r"\s*<<SYS>>(?P<system>.*?)<</SYS>>(?P<user>.*)", re.S)

_STARTS = {n.name: re.compile(n.start) for n in NOTATIONS}
_TURNS = {n.name: re.compile(rf"(?P<start>{n.start})(?P<body>.*?){n.end}(?P<gap>\s*)(?=\Z|{_unnamed})", re.S)
          for n in NOTATIONS for _unnamed in [re.sub(r"\?P<\w+>", "?:", n.start)]}  # fmt: skip
_BEGIN = re.compile(BEGIN)


def parse_chat_text(text: str, where: str = "text") -> tuple[str, tuple[Message, ...]] | None:
    """The notation and the turns of a text that a template wrote; None for a text that is not a chat.

    Raises RowError if there are control tokens, and the text cannot be proved to be turns in one notation.
    """
    if LLAMA2_START.match(text):
        return "[INST]", parse_llama2(text, where)
    if "### Instruction:" in text and "### Response:" in text and (header := ALPACA_START.match(text)):
        return "### Instruction:", _alpaca(header, text, where)
    start = _BEGIN.match(text)
    at = start.end() if start else 0
    for notation in NOTATIONS:
        if not (first := _STARTS[notation.name].match(text, at)):
            continue
        if notation.loose and not _holds_both(notation, first, text):
            continue
        return notation.name, _parsed(notation, text, at, where)
    if control := CONTROL.search(text):
        raise RowError("control_tokens", where, f"the control token {control[0]!r}", ADVICE)
    return None


def _parsed(notation: Notation, text: str, at: int, where: str) -> tuple[Message, ...]:
    messages: list[Message] = []
    styles: dict[str, tuple[str, str]] = {}  # role -> what closes its turns
    pieces: list[tuple[str, str, str, str]] = []  # role as written, start, body, what closes it
    position = at
    while position < len(text):
        turn = _TURNS[notation.name].match(text, position)
        if turn is None:
            raise RowError("control_tokens", where, repr(text[position : position + 40]), f"{notation.name} turns")
        pieces.append((turn["role"], turn["start"], turn["body"], (turn["end"] or "") + turn["gap"]))
        position = turn.end()
    for number, (written, start, body, close) in enumerate(pieces):
        role = _role(written, where)
        last = number == len(pieces) - 1
        if last and role == "assistant" and not body and not close.strip():
            break  # an open generation prompt
        content = body.strip() if notation.loose else body
        again = not notation.loose and _STARTS[notation.name].search(content)
        if (bad := CONTROL.search(content)) or again:
            actual = repr(bad[0]) if bad else "a second turn"
            raise RowError("control_tokens", where, f"{actual} inside a turn of {role}", ADVICE)
        style = styles.setdefault(written, (start, close))
        # Every turn of a role is written as the first one was, the last perhaps cut off: this is the proof.
        if not notation.loose and (style[0] != start or (style[1] != close and not last)):
            actual = f"a turn of {role} that is written otherwise than the one before: {(start + body[:20])!r}"
            raise RowError("control_tokens", where, actual, ADVICE)
        if role != "system" or content.strip():
            messages.append(Message(role, content))
    if text[:at] + "".join(start + body + close for _, start, body, close in pieces) != text or not messages:
        raise RowError("control_tokens", where, repr(text[:40]), ADVICE)
    return tuple(messages)


def _holds_both(notation: Notation, first: re.Match[str], text: str) -> bool:
    roles = {_role(m["role"], "") for m in _STARTS[notation.name].finditer(text)}
    return "assistant" in roles and _role(first["role"], "") in ("user", "system")


def _role(written: str, where: str) -> str:
    role = OTHER_ROLES.get(written.lower()) or READ_ROLES.get(written.lower(), "")
    if role in ("", CALLS):
        raise RowError("control_tokens", where, f"a turn of the role {written!r}", ADVICE)
    return role


def _alpaca(start: re.Match[str], text: str, where: str) -> tuple[Message, ...]:
    """Questions and answers under the headings of Alpaca's prompt; a preamble of its own is a system turn."""
    preamble = start["preamble"].strip()
    messages = [] if preamble in ALPACA_PREAMBLES else [Message("system", preamble)]
    position = start.end()
    while position < len(text):
        turn = ALPACA_TURN.match(text, position)
        if turn is None or any("### Response:" in (turn[part] or "") for part in ("instruction", "input", "output")):
            raise RowError("control_tokens", where, repr(text[position : position + 40]), ADVICE)
        question, given = turn["instruction"].strip(), (turn["input"] or "").strip()
        messages.append(Message("user", f"{question}\n\n{given}" if given else question))
        messages.append(Message("assistant", turn["output"].strip()))
        position = turn.end()
    return tuple(messages)


def parse_llama2(text: str, where: str = "text") -> tuple[Message, ...]:
    """The turns of `<s>[INST] <<SYS>>…<</SYS>> user [/INST] answer </s>…`, blanks around each turn taken off.

    A last user turn without an answer gives no assistant turn. Raises RowError at the first place that does not fit.
    """
    messages: list[Message] = []
    position, length = 0, len(text.rstrip())
    while position < length:
        turn = LLAMA2_TURN.match(text, position)
        if turn is None:
            raise RowError("llama2", where, repr(text[position : position + 40]), "<s>[INST] … [/INST] … </s>")
        user = turn["user"]
        system = LLAMA2_SYSTEM.fullmatch(user)
        if ("<<SYS>>" in user) != bool(system) or (system and messages):
            raise RowError("llama2", where, repr(user.strip()[:40]), "<<SYS>>…<</SYS>> at the start of the first turn")
        if "[INST]" in user or "[/INST]" in turn["answer"]:
            mark = "[INST]" if "[INST]" in user else "[/INST]"
            raise RowError("llama2", where, f"a second {mark} inside a turn", "<s>[INST] … [/INST] … </s>")
        if system:
            if system["system"].strip():
                messages.append(Message("system", system["system"].strip()))
            user = system["user"]
        messages.append(Message("user", user.strip()))
        position = turn.end()
        if turn["answer"].strip() or turn["end"] or position < length:
            messages.append(Message("assistant", turn["answer"].strip()))
    if not messages:
        raise RowError("empty", where, "an empty text", "<s>[INST] … [/INST] … </s>")
    return tuple(messages)
