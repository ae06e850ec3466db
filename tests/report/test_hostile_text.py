"""Hostile text and hostile templates: what a user types, and what a template does, stay within their bounds."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.records import Example, Message
from finetune.errors import FinetuneError, GateRefused, InputError
from finetune.stages.filter import Rendering, chat_renderer
from finetune.tokenization import template_sandbox
from finetune.tokenization.audit import Tally
from finetune.tokenization.chat import TemplateRefused, turn
from finetune.tokenization.chat_template import JinjaRenderer, choose_template, template_text
from finetune.tokenization.label_mask import fuses_with_prompt, last_tokens, token_mask
from finetune.tokenization.row_tokenizer import RowTokenizer
from finetune.tokenization.template_sandbox import check_template, limited
from tests.helpers import row_workers
from tests.helpers.base_templates import ALL
from tests.helpers.tiny_tokenizers import build

GOOD = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'] }}\n{% else %}A: "
    "{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
LOOPS = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
HOSTILE = {
    "long_range": ("{% for i in range(10**9) %}x{% endfor %}", "asks for too much: Range too big"),
    "nested_loops": (LOOPS, "does not end within 1 s"),
    "huge_constant": ("{{ 'a' * 10**10 }}", "outgrows the memory"),
    "huge_text": ("{{ 'a' * (messages|length * 10**10) }}", "outgrows the memory"),
    "wide_format": ("{{ '{:>10000000000}'.format('a') }}", "outgrows the memory"),
    "doubling": (  # whichever a busy machine meets first
        "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "(outgrows the memory|does not end within 1 s)",
    ),
    "huge_number": ("{{ 10 ** (10 ** 9) }}", "does not end within 1 s"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deeply"),
    "attribute": ("{{ ''.__class__ }}", "sandbox forbids .*'__class__' of 'str'"),
    "attribute_chain": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "sandbox forbids .*'__class__'"),
    "attribute_by_item": ("{{ ''['__class__'] }}", "sandbox forbids .*'__class__'"),
    "attribute_by_filter": ("{{ ''|attr('__class__') }}", "sandbox forbids .*'__class__'"),
    "attribute_by_format": ("{{ '{0.__class__}'.format(1) }}", "sandbox forbids .*'__class__'"),
    "changing_the_chat": ("{{ messages.append(1) }}", "sandbox forbids .*'append' of 'list'"),
    "include": ("{% include '/etc/passwd' %}", r"line 1: it loads another file \(include\)"),
    "import": ("{% import 'os' as os %}", r"line 1: it loads another file \(import\)"),
    "extends": ("\n{% extends 'base' %}", r"line 2: it loads another file \(extends\)"),
    "syntax": ("\n\n{% for %}", "line 3: it is not valid Jinja"),
}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less patience, so that the tests take less of it."""
    monkeypatch.setattr(template_sandbox, "CPU_SECONDS", 1)
    monkeypatch.setattr(template_sandbox, "ROW_SECONDS", 1)
    monkeypatch.setattr(template_sandbox, "TOO_MUCH", template_sandbox.TOO_MUCH.replace("5 s", "1 s"))


@pytest.mark.skipif(sys.platform == "win32", reason="it has no such signals")
def test_a_trial_that_somebody_kills_says_nothing_of_the_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = tmp_path / "probe.py"
    probe.write_text("import os; os.kill(os.getpid(), 15)")
    text = f"{GOOD}{{# tried nowhere else #}}"
    with monkeypatch.context() as patched:
        patched.setattr(template_sandbox, "PROBE", probe)
        with pytest.raises(FinetuneError, match=r"tries a chat template out was killed by SIGTERM; run again") as error:
            template_sandbox.check_template(text, SPECIAL, "mine")
        assert error.value.exit_status == 1  # not 2: nothing is wrong with the recipe
    template_sandbox.check_template(text, SPECIAL, "mine")


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is limited on Linux only")
@pytest.mark.parametrize("fault", HOSTILE)
def test_a_hostile_template_is_refused_before_it_is_used(short: None, tmp_path: Path, fault: str) -> None:
    text, says = HOSTILE[fault]
    file = tmp_path / "mine.jinja"
    file.write_text(text + GOOD, encoding="utf-8")
    with pytest.raises(
        InputError, match=rf"render\.template mine\.jinja: .*{says}.*choose another by render\.template"
    ):
        choose_template("mine.jinja", file, build("metaspace"), [])


def test_the_bases_own_template_is_tried_out_too() -> None:
    with pytest.raises(InputError, match="the base's chat template: the sandbox forbids"):
        choose_template("auto", None, build("metaspace", "{{ ''.__class__ }}" + GOOD), [])


def test_the_filter_tries_its_template_out_too(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{% include 'x' %}" + GOOD, encoding="utf-8")
    rendering = Rendering(template="mine.jinja", merge_system=True, template_file=tmp_path / "mine.jinja")
    with pytest.raises(InputError, match=r"filter\.count: rendered uses: line 1: it loads another file"):
        chat_renderer(rendering, build("metaspace"))


@pytest.mark.parametrize("name", ALL)
def test_what_bases_ship_passes_the_trial(name: str) -> None:
    check_template(ALL[name], SPECIAL, name)


def test_a_file_that_is_no_template(tmp_path: Path) -> None:
    (tmp_path / "bytes.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"bytes\.jinja cannot be read as UTF-8 text"):
        template_text("bytes.jinja", tmp_path / "bytes.jinja")
    with pytest.raises(InputError, match="holds 100,001 characters, allowed are 100,000"):
        check_template(" " * 100_001, SPECIAL, "long")


def test_a_template_that_refuses_every_probe_may_still_take_the_rows() -> None:
    check_template("{{ raise_exception('only on Sundays') }}", SPECIAL, "sundays")
    check_template("{{ messages[7]['content'] + 1 / 0 }}", SPECIAL, "later")


def test_a_template_that_hangs_on_one_conversation_only_is_stopped_there(short: None) -> None:
    text = "{% for m in messages %}{% if 'trap' in m['content'] %}" + LOOPS + "{% endif %}{% endfor %}" + GOOD
    check_template(text, SPECIAL, "sly")
    render = JinjaRenderer(text, SPECIAL)
    assert render([turn("user", "a"), turn("assistant", "b")])[0] == "<s>Q: a\nA: b</s>"
    with pytest.raises(TemplateRefused, match="does not finish in the allowed time on a conversation of 1 turns"):
        render([turn("user", "a trap")])
    assert render([turn("user", "a"), turn("assistant", "b")])[1] == [(11, 16)]  # and nothing is left behind


def test_the_limit_leaves_no_timer_and_no_handler() -> None:
    import signal

    before = signal.getsignal(signal.SIGVTALRM)
    with limited(3):
        assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0) and signal.getsignal(signal.SIGVTALRM) == before


@pytest.mark.parametrize(
    "fault", ["{{ 1 / 0 }}", "{{ {}['a'].b }}", "{{ 'a'.index('b') }}", "{{ none + 'a' }}", "{{ range(10**6) }}"]
)
def test_a_fault_in_a_template_refuses_the_row_and_is_no_crash(fault: str) -> None:
    with pytest.raises(TemplateRefused):
        JinjaRenderer(fault, SPECIAL)([turn("user", "a")])


def test_tool_calls_nested_too_deeply_refuse_the_row() -> None:
    deep: object = 1
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(TemplateRefused):
        JinjaRenderer(GOOD, SPECIAL)([{**turn("user", "a"), "tool_calls": deep}])


def test_no_template_is_taken_that_would_train_on_what_the_base_refuses() -> None:
    rows = [Example("r:1", "r", (Message("user", "a"), Message("user", "b"), Message("assistant", "c")))]
    with pytest.raises(GateRefused, match=r"takes none of the 1 rows .*row r:1: .*alternate!"):
        choose_template("auto", None, build("metaspace", ALL["mistral_card"]), rows)
    rows.append(Example("r:2", "r", (Message("user", "a"), Message("assistant", "c"))))
    assert choose_template("auto", None, build("metaspace", ALL["mistral_card"]), rows).name == "base"


def test_marked_ranges_are_transformers_own_without_its_quadratic_count() -> None:
    from transformers.utils import chat_template_utils

    chat = [turn(("user", "assistant")[i % 2], f"é {i}\n") for i in range(40)]
    text, spans = JinjaRenderer(GOOD, SPECIAL)(chat)
    compiled = chat_template_utils._cached_compile_jinja_template(GOOD)  # not the one that we changed
    plain, theirs = chat_template_utils._render_with_assistant_indices(compiled, chat, None, None, False, **SPECIAL)
    assert (text, spans) == (plain, theirs) and text[spans[-1][0] : spans[-1][1]] == "é 39\n</s>"
    # once transformers counts otherwise, template_limits.count_once can go
    assert 'len("".join(self._rendered_blocks))' in inspect.getsource(chat_template_utils)


TYPED = (
    "<s>", "</s>", "<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|begin_of_text|>", "[INST]",
    "[/INST]", "<<SYS>>", "\x00", "\x1b", "\u2028", "\u202e", "\ufeff", "\U0010ffff", "é", "🙂", "<", "/s>",
    " ", "a", "\n",
)  # fmt: skip
typed = st.lists(st.sampled_from(TYPED), min_size=1, max_size=8).map("".join)


def worker(kind: str, name: str) -> tuple[RowTokenizer, object]:
    """A row tokenizer with a named template."""
    tokenizer = build(kind)
    chosen = row_workers.template(tokenizer, template_text(name, None))
    return row_workers.worker(tokenizer, chosen, max_length=10_000, overlong="drop", bos_id=None), tokenizer


@pytest.mark.parametrize(
    ("kind", "name"),
    [("byte_level", "chatml"), ("byte_level", "llama3"), ("metaspace", "mistral"), ("unigram", "zephyr")],
)
@settings(max_examples=40, deadline=None)
@given(question=typed, answer=typed)
def test_a_typed_control_string_never_is_a_control_token(kind: str, name: str, question: str, answer: str) -> None:
    rows, tokenizer = worker(kind, name)
    tally = Tally()

    def control(q: str, a: str) -> list[int] | None:
        done = rows.batch([Example("r:1", "r", (Message("user", q), Message("assistant", a)))], tally)
        unknown = tokenizer.unk_token_id  # a character without a token: no control token where the template wrote none
        return [i for i in done[0].ids.tolist() if i in rows.encoder.special_ids and i != unknown] if done else None

    found = control(question, answer)
    if found is None:
        assert tally.dropped  # with the reason
    else:
        assert found == control("a", "b")


spans_of = st.lists(st.integers(0, 40), max_size=12).map(lambda c: list(zip(*[iter(sorted(c))] * 2, strict=False)))
offsets_of = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5)), max_size=20)


@settings(max_examples=300, deadline=None)
@given(offsets=offsets_of, spans=spans_of.flatmap(st.permutations), in_order=st.booleans())
def test_masks_by_bisection_are_those_by_looking_at_every_span(
    offsets: list[tuple[int, int]], spans: list[tuple[int, int]], in_order: bool
) -> None:
    listed = sorted(offsets) if in_order else offsets
    table = np.array([(start, start + length) for start, length in listed], np.int64).reshape(-1, 2)
    ends = np.maximum(table[:, 1], table[:, 0] + 1)
    held = [(table[:, 0] < last) & (ends > first) for first, last in spans]
    wanted = np.any(held, axis=0) if held else np.zeros(len(table), bool)
    wanted[:1] = False
    assert token_mask(table, spans).tolist() == wanted.astype(int).tolist()
    assert last_tokens(table, spans) == [int(np.flatnonzero(h)[-1]) if h.any() else None for h in held]
    borders = [first for first, _ in spans]
    over = any(((table[:, 0] < border) & (table[:, 1] > border)).any() for border in borders)
    assert fuses_with_prompt(table, borders) == over
