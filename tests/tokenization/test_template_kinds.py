"""Chat templates of kinds that neither TRL nor our folder has; each is written here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.data.records import Example, Message
from finetune.errors import GateRefused
from finetune.tokenization.audit import Tally
from finetune.tokenization.chat_template import choose_template
from finetune.tokenization.id_check import IdCheck
from tests.helpers import row_workers
from tests.helpers.row_workers import decode, learned, row
from tests.helpers.template_tokenizers import chat_of, tokenizer_for

LOOP = "{% for m in messages %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
HEAD = "<|im_start|>{{ m['role'] }}\n"
CHATML = LOOP + HEAD + "{{ m['content'] }}<|im_end|>\n{% endfor %}" + PROMPT
GLM4 = (
    "[gMASK]<|sop|>" + LOOP + "<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SOLAR = (
    LOOP + "{% if m['role'] == 'assistant' %}### Assistant:\n{% else %}### User:\n{% endif %}{{ m['content'] }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
R1 = (
    LOOP + "{% if m['role'] == 'assistant' %}<|A|>{{ m['content'].split('</think>')[-1] }}<|end|>"
    "{% else %}<|U|>{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|A|><think>\n{% endif %}"
)
LISTED = LOOP + HEAD + "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}<|im_end|>\n{% endfor %}" + PROMPT
INDEXED = "{% if tools | length > 0 %}{{ tools[0]['function']['name'] }}\n{% endif %}" + CHATML
ALWAYS = CHATML.replace(PROMPT, "{{ '<|im_start|>assistant\n' }}")
CALLS = (
    LOOP + HEAD + "{% if not m['content'] and m['tool_calls'] is defined %}{% for c in m['tool_calls'] %}<tool_call>"
    "{{ c['function']['name'] + ' ' + c['function']['arguments'] }}</tool_call>{% endfor %}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}" + PROMPT
)
THOUGHT = "<think>\nwhy\n</think>\n\n"
CALL = {"tool_calls": [{"function": {"name": "look", "arguments": {"at": "sea"}}}]}
TWO = row("first", "alpha one", "second", "bravo two")


def run(template: Any, *rows: Example, eos: str = "<|im_end|>", special: tuple[str, ...] = (), **rules: Any):
    """Training rows, tally and tokenizer, after every gate of render; ids are compared with apply_chat_template."""
    names = ["<|im_start|>", *special]
    tokenizer = tokenizer_for(template if isinstance(template, str) else "".join(template.values()), eos, names)
    tokenizer.chat_template = template
    reasoning = rules.pop("reasoning", "auto")
    chosen = choose_template("auto", None, tokenizer, rows, "merge", reasoning)
    worker, tally, check = row_workers.worker(tokenizer, chosen, **rules), Tally(), IdCheck(tokenizer, chosen)
    made = worker.batch(rows, tally)
    for one in rows:
        check.compare(one, worker)
    worker.check_prompts(rows)
    return made, tally, tokenizer


@pytest.mark.parametrize(
    ("template", "eos", "labels"),
    [
        (GLM4, "<|user|>", ["alpha one<|user|>", "bravo two<|user|>"]),
        (LISTED, "<|im_end|>", ["alpha one<|im_end|>", "bravo two<|im_end|>"]),
        (INDEXED, "<|im_end|>", ["alpha one<|im_end|>", "bravo two<|im_end|>"]),
        (ALWAYS, "<|im_end|>", ["alpha one<|im_end|>", "bravo two<|im_end|>"]),
        ("\n" + CHATML, "<|im_end|>", ["alpha one<|im_end|>", "bravo two<|im_end|>"]),
        ("{{ '\\n\\n' }}" + CHATML, "<|im_end|>", ["alpha one<|im_end|>", "bravo two<|im_end|>"]),
        (
            CHATML.replace("{{ m['content'] }}", "{{ ' ' + m['content'] }}"),
            "<|im_end|>",
            [" alpha one<|im_end|>", " bravo two<|im_end|>"],
        ),
        (
            CHATML.replace("{{ m['content'] }}", "{{ '\\n' + m['content'] + '\\n' }}"),
            "<|im_end|>",
            ["\nalpha one\n<|im_end|>", "\nbravo two\n<|im_end|>"],
        ),
        (
            CHATML.replace("{{ m['content'] }}", "{{ m['content'] | trim | upper | lower }}"),
            "<|im_end|>",
            ["alpha one<|im_end|>", "bravo two<|im_end|>"],
        ),
        (
            "{% macro one(m) %}{% set said = m['content'] %}<|im_start|>{{ m['role'] ~ '\\n' ~ said ~ '<|im_end|>' }}"
            "{% endmacro %}" + LOOP + "{{ one(m) }}\n{% endfor %}" + PROMPT,
            "<|im_end|>",
            ["alpha one<|im_end|>", "bravo two<|im_end|>"],
        ),
    ],
    ids=["glm4", "list", "tools", "always", "newline", "newlines", "space", "newline_answer", "filters", "macro"],
)
def test_each_answer_and_its_end_carry_labels(template, eos, labels) -> None:
    (made,), tally, tokenizer = run(template, TWO, eos=eos)
    assert learned(tokenizer, made) == labels and not tally.dropped and not tally.masked
    chat = chat_of(TWO)
    if template == LISTED:
        chat = [{**t, "content": [{"type": "text", "text": t["content"]}]} for t in chat]
    own = tokenizer.apply_chat_template(chat, tools=[] if template == INDEXED else None, return_dict=False)
    assert made.ids.tolist() == [*own, *([tokenizer.eos_token_id] if template == GLM4 else [])]


def test_a_template_without_an_end_is_refused_with_that_reason() -> None:
    with pytest.raises(GateRefused, match=r"writes no token that ends an answer, so the model would never learn") as e:
        run(SOLAR, TWO, eos="</s>")
    assert "\n" not in str(e.value)
    marked = SOLAR.replace("### User:", "<|u|>").replace("### Assistant:", "<|a|>")
    with pytest.raises(GateRefused, match=r"ends an answer; '<\|u\|>', which opens the next turn, does not stop this"):
        run(marked, TWO, eos="</s>")
    assert learned(*reversed_pair(run(marked, TWO, eos="<|u|>"))) == ["alpha one\n\n<|u|>", "bravo two\n\n<|u|>"]


def reversed_pair(done: Any) -> tuple[Any, Any]:
    (made,), _, tokenizer = done
    return tokenizer, made


@pytest.mark.parametrize("inline", [True, False])
def test_a_prompt_that_opens_a_block_is_closed_by_the_answer(inline) -> None:
    extra = None if inline else json.dumps({"reasoning_content": "why"})
    said = Message("assistant", THOUGHT + "alpha one" if inline else "alpha one", extra)
    (made,), _, tokenizer = run(R1, Example("r:1", "r", (Message("user", "first"), said)), eos="<|end|>")
    assert decode(tokenizer, made.ids.tolist()) == "<|U|>first<|A|><think>\nwhy\n</think>\n\nalpha one<|end|>"
    assert learned(tokenizer, made) == ["why\n</think>\n\nalpha one<|end|>"]


def test_earlier_reasoning_that_the_template_drops_is_kept_where_it_is_asked_for() -> None:
    asked = row("first", THOUGHT + "alpha one", "second", THOUGHT.replace("why", "how") + "bravo two")
    wanted = ["why\n</think>\n\nalpha one<|end|>", "how\n</think>\n\nbravo two<|end|>"]
    assert learned(*reversed_pair(run(R1, asked, eos="<|end|>", reasoning="keep"))) == wanted
    last = run(R1, asked, eos="<|end|>", supervise="last")
    assert learned(*reversed_pair(last)) == wanted[1:]


def test_two_named_templates() -> None:
    both = {"default": CHATML, "tool_use": CALLS.replace(LOOP, "{{ tools[0]['name'] }}!" + LOOP, 1)}
    asked = Example("r:2", "r", TWO.messages, tools=json.dumps([{"name": "look"}]))
    made, _, tokenizer = run(both, TWO, asked)
    first, second = (decode(tokenizer, one.ids.tolist()) for one in made)
    assert second == "look!" + first
    assert learned(tokenizer, made[0]) == learned(tokenizer, made[1])


def test_named_templates_without_a_default_are_refused_once() -> None:
    with pytest.raises(
        GateRefused, match=r"the chat templates 'rag', 'tool_use', and none is named 'default'; set"
    ) as e:
        run({"rag": CHATML, "tool_use": CALLS}, TWO)
    assert "\n" not in str(e.value)
    (made,), _, _ = run({"default": CHATML}, TWO)
    assert len(made.ids)


NONE = pytest.param(
    CALLS.replace("not m['content']", "m['content'] is none"),
    marks=pytest.mark.xfail(
        reason="apply_chat_template drops fields that are None, so the id gate refuses", strict=True
    ),
)


@pytest.mark.parametrize("template", [CALLS, NONE])
@pytest.mark.parametrize("given", ["object", "text"])
@pytest.mark.parametrize("bare", [True, False])
def test_calls_in_the_form_that_the_template_takes(template, given, bare) -> None:
    """The template writes a call by `+`, so its arguments are text; one of them only beside a content of None."""
    extra = json.loads(json.dumps(CALL))
    if given == "text":
        extra["tool_calls"][0]["function"]["arguments"] = json.dumps({"at": "sea"})
    if not bare:
        extra["tool_calls"][0] |= {"id": "c1", "type": "function"}
    said = (Message("user", "Look."), Message("assistant", "", json.dumps(extra)), Message("tool", "blue"))
    asked = Example("r:1", "r", (*said, Message("assistant", "It is blue.")))
    (made,), _, tokenizer = run(template, asked)
    assert learned(tokenizer, made) == [
        '<tool_call>look {"at": "sea"}</tool_call><|im_end|>',
        "It is blue.<|im_end|>",
    ]


def test_one_row_that_the_template_refuses_is_dropped_and_the_others_are_trained(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    from finetune.context import Context
    from finetune.data.records import write_rows
    from finetune.recipe import Render, Runtime, Tracking
    from finetune.stages import render

    picky = LOOP + "{% if 'no' in m['content'] %}{{ raise_exception('I refuse') }}{% endif %}{% endfor %}" + CHATML
    rows = [row(f"q {i}", "no" if i == 7 else "yes", name=f"r:{i}") for i in range(20)]
    folders = {"base": tmp_path / "base", "split": tmp_path / "split"}
    folders["split"].mkdir()
    tokenizer_for(picky, "<|im_end|>", ["<|im_start|>"]).save_pretrained(folders["base"])
    write_rows(folders["split"] / "train.parquet", rows)
    (tmp_path / "out").mkdir()
    context = Context(scratch=tmp_path, runtime=Runtime(), tracking=Tracking())
    metrics = render.run(Render(), folders, tmp_path / "out", context)
    reason = "the chat template refused: I refuse"
    assert metrics["dropped_because"] == {reason: 1} and metrics["rows"] == 19
    (reject,) = pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()
    assert (reject["id"], reject["reason"]) == ("r:7", reason)
