"""A tokenizer for any chat template, and a judge of labels that uses transformers and string operations alone."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from finetune.data.records import Example
from tests.helpers.row_workers import decode, learned

# what templates write as control tokens: <|…|>, <｜…｜>, <|x>, <x|>, <start_of_turn>, </s>, [INST], [|user|], ]~b]
CONTROL = re.compile(
    r"<[|｜][^<>'\"\s{}]{1,40}[|｜]>|<\|[a-z_]{1,20}>|<[a-z_]{1,20}\|>|\[\|[a-z]{1,20}\|\]|</?s>|<(?:start|end)_of_[a-z]+>"
    r"|<(?:bos|eos|pad|sop)>|\[/?[A-Z][A-Z_]{2,}\]|\[e~\[|\]~[!b]\w*\]?|\[gMASK\]"
)
ORDINARY = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
Chat = list[dict[str, Any]]
ARGUMENT = "Qvist"
CALL = {"id": "abc123def", "type": "function", "function": {"name": "weather_now", "arguments": {"place": ARGUMENT}}}
ASKED: dict[str, Any] = {"role": "user", "content": "question"}
RESULT: dict[str, Any] = {"role": "tool", "content": "rain drizzle", "tool_call_id": "abc123def", "name": "weather_now"}
ANSWERED: Chat = [ASKED, {"role": "assistant", "content": "the answer"}, {"role": "user", "content": "thanks"}]
CALLED: Chat = [ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT]


@cache
def _alphabet() -> dict[str, int]:
    return {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def tokenizer_for(template: str, eos: str | None = None, special: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges. The template's control strings are special tokens, `ORDINARY` are added
    tokens that are not special. Its EOS is `eos`, or the token that the template itself writes after an answer.
    """
    backend = Tokenizer(models.BPE(_alphabet(), []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    names = sorted({*CONTROL.findall(template), *special, *([eos] if eos else [])} - set(ORDINARY))
    names += [s for s in ("<|bos|>", "<|eos|>", "<|pad|>") if s not in names]
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in names])
    backend.add_tokens([AddedToken(s, normalized=False) for s in ORDINARY])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|bos|>", eos_token=eos or "<|eos|>", pad_token="<|pad|>"
    )
    made.chat_template = template
    if eos is None and "eos_token" not in template:
        made.eos_token = end_of(made) or "<|eos|>"
    return made


def save_stops(tokenizer: PreTrainedTokenizerFast, folder: Path, chats: Sequence[Chat]) -> None:
    """Write the generation_config.json of such a base: its EOS, and what ends the answers of these chats."""
    ends = [tokenizer.eos_token, *(end_of(tokenizer, chat) for chat in chats)]
    ids = sorted({tokenizer.get_vocab()[end] for end in ends if end})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}), encoding="utf-8")


def end_of(tokenizer: PreTrainedTokenizerFast, chat: Chat = ANSWERED) -> str:
    """The special token that ends the last turn but one, a call or an answer: the first after an answer, the last after
    a call, in a text without the turn behind it, or else the first before that turn.
    """
    *before, answer, _ = chat
    core = answer["content"] or ARGUMENT
    for turns in ([*before, answer], chat):
        last = [turns[-1]["content"]] if len(turns) == len(chat) else []
        _, _, rest = (own_text(tokenizer, turns, [core, *last]) or "").rpartition(core)
        rest = rest[: rest.find(last[0])] if last else rest
        names = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        places = sorted((rest.find(s), -len(s), s) for s in names if s in rest)
        if places:
            return places[-1 if not last and not answer["content"] else 0][2]
    return ""


def forms(chat: Chat) -> list[Chat]:
    """The chat with its content as text and as list of parts; a call's arguments as object and as text, beside "" and
    None; a system message apart and before the first question.
    """
    chats = [chat]
    if chat[0]["role"] == "system":
        first = {**chat[1], "content": f"{chat[0]['content']}\n\n{chat[1]['content']}"}
        chats.append([first, *chat[2:]])
    made = []
    for one in chats:
        for written in (json.dumps, None):
            for empty in ("", None):
                made.append([_with_calls(turn, written, empty) for turn in one])
    listed = [[{**t, "content": [{"type": "text", "text": t["content"] or ""}]} for t in one] for one in made]
    return [*made, *listed] if any("tool_calls" in t for t in chat) else [*made[::4], *listed[::4]]


def _with_calls(turn: dict[str, Any], written: Any, empty: str | None) -> dict[str, Any]:
    if "tool_calls" not in turn:
        return turn
    calls = [json.loads(json.dumps(call)) for call in turn["tool_calls"]]
    for call in calls:
        if written:
            call["function"]["arguments"] = written(call["function"]["arguments"])
    return {**turn, "content": turn["content"] or empty, "tool_calls": calls}


def own_text(
    tokenizer: PreTrainedTokenizerFast, chat: Chat, words: Sequence[str], prompt: bool = False, tools: Any = None
) -> str | None:
    """What apply_chat_template writes in the first form that holds all words, or None."""
    for form in forms(chat):
        for given in (tools, tools or []):
            try:
                text = tokenizer.apply_chat_template(form, tools=given, tokenize=False, add_generation_prompt=prompt)
            except Exception:
                continue
            if isinstance(text, str) and all(word in text for word in words):
                return text
    return None


def chat_of(row: Example) -> Chat:
    """The row's messages as apply_chat_template takes them."""
    return [{"role": m.role, "content": m.content, **(json.loads(m.extra) if m.extra else {})} for m in row.messages]


def problem(
    tokenizer: PreTrainedTokenizerFast, row: Example, made: Any, words: Sequence[str], not_words: Sequence[str]
) -> str:
    """What is wrong with a training row's labels, or an empty string.

    The labelled text must hold `words` in order and none of `not_words`, each run of labels must end with the base's
    end token and hold it once, and the last run must be what apply_chat_template writes behind its own prompt, up to
    that token. Ids must be those of its text wherever that text begins with the prompt.
    """
    end = end_of(tokenizer)
    runs, chat = learned(tokenizer, made), chat_of(row)
    joined, place = "".join(runs), 0
    for word in words:
        place = joined.find(word, place)
        if place < 0:
            return f"{word!r} carries no label in {runs}"
    if found := [word for word in not_words if word in joined]:
        return f"{found} carry a label in {runs}"
    if not runs[-1].endswith(end) or runs[-1].count(end) != 1:
        return f"the answer does not end with one {end!r}: {runs[-1]!r}"
    said = [str(t["content"]).strip() for t in chat]
    text, prompt = own_text(tokenizer, chat, said), own_text(tokenizer, chat[:-1], said[:-1], True)
    if text is None or prompt is None:
        return "apply_chat_template does not write this row"
    if not text.startswith(prompt):
        return ""
    wanted = text[len(prompt) :]
    if end in wanted:
        wanted = wanted[: wanted.index(end) + len(end)]
        if tokenizer(text, add_special_tokens=False)["input_ids"] != made.ids.tolist():
            return f"the ids are not those of the base's text: {decode(tokenizer, made.ids.tolist())!r} for {text!r}"
    else:  # the next turn's first token ends it
        wanted = wanted.rstrip()
    return "" if runs[-1].startswith(wanted) else f"labelled is {runs[-1]!r}, the base writes {wanted!r}"
