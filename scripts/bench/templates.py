"""Templates × kinds of rows: does every answer get its labels, its end, and nothing else?

    .venv/bin/python scripts/bench/templates.py FOLDER [--markdown]

FOLDER holds chat templates (*.jinja). Each is rendered with a byte-level tokenizer made here, whose special tokens are
the control strings that the template writes. A case passes if the ids are those of apply_chat_template (or the reason
why they differ is known), and if decoding the labelled ids gives each learned answer and its end, and no word of
another turn. The decoding shares no code with what is checked. A refusal is shown with its reason.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from finetune.data.records import Example, Message
from finetune.errors import FinetuneError
from finetune.tokenization.audit import Tally
from finetune.tokenization.chat_template import choose_template
from finetune.tokenization.encoder import Encoder
from finetune.tokenization.id_check import IdCheck
from finetune.tokenization.row_tokenizer import RowTokenizer, Rules

CONTROL = re.compile(
    r"<[|｜][^<>'\"\s{}]{1,40}[|｜]>|\[\|[a-z]{1,20}\|\]|<(?:start|end)_of_(?:turn|image)>|</?s>|\[/?(?:INST|TOOL_CALLS|TOOL_RESULTS|"
    r"AVAILABLE_TOOLS|SYSTEM_PROMPT|ARGS|CALL_ID|THINK|gMASK)\]|<(?:bos|eos|pad|turn\||\|turn|channel\||\|channel|"
    r"tool_call\||\|tool_call|\|tool_response|tool_response\||sop|end_of_utterance|\|think\|)>|\[e~\[|\]~[!b]\w*\]?"
)
ORDINARY = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
# what the generation_config.json of the bases that have these tokens names as eos_token_id
ENDS = ("<|im_end|>", "<|eot_id|>", "<|user|>", "<|observation|>", "<end_of_turn>", "<|return|>", "<|call|>", "<turn|>",
        "<|END_OF_TURN_TOKEN|>", "<|tool_response>")  # fmt: skip
TOOL = {
    "type": "function",
    "function": {
        "name": "weather_now",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "description": "a town"}},
            "required": ["place"],
        },
    },
}
CALL = {"id": "abc123def", "type": "function", "function": {"name": "weather_now", "arguments": {"place": "Qvist"}}}


def _m(role: str, content: str, learn: bool = True, **extra: object) -> Message:
    return Message(role, content, json.dumps(extra) if extra else None, learn)


THREE = (
    _m("user", "first question"), _m("assistant", "alpha one"), _m("user", "second question"),
    _m("assistant", "bravo two"), _m("user", "third question"), _m("assistant", "charlie three"),
)  # fmt: skip
THINKING = (
    _m("user", "first question"), _m("assistant", "alpha one", reasoning_content="thought ember"),
    _m("user", "second question"), _m("assistant", "bravo two", reasoning_content="thought flint"),
)  # fmt: skip
TOOLS = (
    _m("user", "weather in Qvist?"), _m("assistant", "", tool_calls=[CALL]),
    _m("tool", "rain drizzle", tool_call_id="abc123def", name="weather_now"), _m("assistant", "It rains today."),
)  # fmt: skip
ASKED = ("question",)
# case -> (messages, words that must be labelled in order, words that must not, supervise, reasoning, tools)
CASES: dict[str, tuple[Sequence[Message], Sequence[str], Sequence[str], str, str, bool]] = {
    "plain": (THREE[:2], ["alpha one"], ASKED, "assistant", "auto", False),
    "system": ((_m("system", "be brief"), *THREE[:2]), ["alpha one"], ["be brief", *ASKED], "assistant", "auto", False),
    "three turns": (THREE, ["alpha one", "bravo two", "charlie three"], ASKED, "assistant", "auto", False),
    "empty answer": ((THREE[0], _m("assistant", "")), [""], ASKED, "assistant", "auto", False),
    "tools": (
        TOOLS, ["weather_now", "place", "Qvist", "It rains today."], ["rain drizzle", "a town"],
        "assistant", "auto", True,
    ),
    "reasoning kept": (THINKING, ["ember", "alpha one", "flint", "bravo two"], ASKED, "assistant", "keep", False),
    "reasoning stripped": (
        THINKING, ["alpha one", "bravo two"], [*ASKED, "ember", "flint"], "assistant", "strip", False,
    ),
    "white space": (
        (_m("user", " \n padded? "), _m("assistant", "\n  spaced out \n")), ["spaced out"], ["padded"],
        "assistant", "auto", False,
    ),
    "last turn only": (THINKING, ["flint", "bravo two"], ["alpha one", "ember", *ASKED], "last", "auto", False),
}  # fmt: skip


def tokenizer_for(template: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges; the template's control strings are special, <think> is not."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    found = sorted(set(CONTROL.findall(template)) - set(ORDINARY))
    found += [s for s in ("<|bos|>", "<|eos|>", "<|pad|>") if s not in found]
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in found])
    backend.add_tokens([AddedToken(s, normalized=False) for s in ORDINARY])
    eos = next((s for s in ENDS if s in found and "eos_token" not in template), "<|eos|>")
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", eos_token=eos, pad_token="<|pad|>")
    made.chat_template = template
    return made


def try_case(template: str, name: str) -> str:
    """An empty string if the case passes, "refused: …" or what is wrong."""
    messages, wanted, unwanted, supervise, reasoning, tools = CASES[name]
    tokenizer = tokenizer_for(template)
    row = Example("r:1", "r", tuple(messages), tools=json.dumps([TOOL]) if tools else None)
    try:
        with tempfile.TemporaryDirectory() as folder:
            stops = [i for s in ENDS if (i := tokenizer.get_vocab().get(s)) is not None]
            config = {"eos_token_id": [tokenizer.eos_token_id, *stops]}
            Path(folder, "generation_config.json").write_text(json.dumps(config))
            chosen = choose_template("auto", None, tokenizer, [row], "merge", reasoning, Path(folder))  # type: ignore[arg-type]
        encoder = Encoder(tokenizer)
        ids = frozenset(tokenizer.get_vocab()[s] for s in chosen.finder.stops)
        rules = Rules(supervise, 100_000, "truncate", None, None, False, tokenizer.eos_token, ids)  # type: ignore[arg-type]
        worker, tally, check = RowTokenizer(chosen, encoder, rules), Tally(), IdCheck(tokenizer, chosen)
        rows = worker.batch([row], tally)
        check.compare(row, worker)
        worker.check_prompts([row])
    except FinetuneError as error:
        return f"refused: {str(error).splitlines()[0]}"
    if not rows:
        return f"refused: {next(iter(tally.dropped), 'no row')}"
    ids, mask = rows[0].ids.tolist(), rows[0].mask.tolist()
    return judge(tokenizer, ids, mask, wanted, unwanted, bool(tally.masked))


def judge(
    tokenizer: PreTrainedTokenizerFast,
    ids: list[int],
    mask: list[int],
    wanted: Sequence[str],
    unwanted: Sequence[str],
    masked: bool,
) -> str:
    """What is wrong with the labels, by decoding alone."""
    runs: list[list[int]] = []
    for at, (token, flag) in enumerate(zip(ids, mask, strict=True)):
        if flag:
            if not at or not mask[at - 1]:
                runs.append([])
            runs[-1].append(token)
    texts = [tokenizer.decode(run, skip_special_tokens=False) for run in runs]
    learned, place = "\n".join(texts), 0
    for word in wanted:
        at = learned.find(word, place)
        if at < 0 and not masked:
            return f"{word!r} carries no label: {learned!r}"
        place = max(place, at)
    for word in unwanted:
        if word in learned:
            return f"{word!r} carries a label: {learned!r}"
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    if runs[-1][-1] not in special:
        return f"the last answer does not end with a control token: {texts[-1]!r}"
    return ""


def main() -> int:
    """Print one line a template, and the totals."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--markdown", action="store_true", help="a table for docs/templates.md")
    parser.add_argument("--why", action="store_true", help="the reason of each case that does not pass")
    asked = parser.parse_args()
    files = sorted(asked.folder.glob("*.jinja"))
    found = {p.name: {c: try_case(p.read_text(encoding="utf-8"), c) for c in CASES} for p in files}
    marks = {
        name: ["yes" if not r else "refused" if r.startswith("refused") else "WRONG" for r in row.values()]
        for name, row in found.items()
    }
    bar = " | " if asked.markdown else "  "
    print(bar.join(["template", *CASES]))
    if asked.markdown:
        print("|".join(["---"] * (len(CASES) + 1)))
    for name, row in marks.items():
        print(bar.join([name, *row]))
        if asked.why:
            for case, reason in found[name].items():
                if reason:
                    print(f"    {case}: {reason}")
    for number, case in enumerate(CASES):
        column = [row[number] for row in marks.values()]
        count = column.count
        print(f"{case}: {count('yes')} of {len(column)}, refused {count('refused')}, wrong {count('WRONG')}")
    return int(any("WRONG" in row for row in marks.values()))


if __name__ == "__main__":
    sys.exit(main())
