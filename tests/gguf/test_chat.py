"""Template and terminators in a GGUF, and the Modelfile read as Ollama's own parser reads it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.errors import GateRefused, InputError
from finetune.gguf import writer as gguf_writer
from finetune.gguf.chat import differences
from finetune.gguf.ollama import Pieces, modelfile, read_pieces
from finetune.stages import export
from finetune.tokenization import template_sandbox
from finetune.utils.files import write_json
from tests.helpers import ollama
from tests.helpers.base_templates import ALL, CHATML, kind_of
from tests.helpers.exported import merged
from tests.helpers.tiny_tokenizers import build
from tests.stages.test_export import run

SYSTEM = {"role": "system", "content": "Be kind."}
TURNS = [{"role": r, "content": f"{r} {n}\nline"} for n in range(3) for r in ("user", "assistant")][:-1]


@pytest.mark.parametrize("name", ALL)
def test_ollama_reads_the_modelfile_and_renders_what_the_template_renders(name):
    tokenizer = build(kind_of(name), ALL[name])
    pieces = read_pieces(lambda chat, prompt: export._rendered(tokenizer, chat, prompt))
    text = modelfile("x.gguf", pieces, ["<|im_end|>", 'a"b', "\n\n"], tokenizer.bos_token)
    commands = ollama.parse(text)
    assert commands[0] == ("from", "./x.gguf") and [v for n, v in commands if n == "stop"] == [
        "<|im_end|>",
        'a"b',
        "\n\n",
    ]
    (template,) = (v for n, v in commands if n == "template")
    for chat in ([TURNS[0]], TURNS, [SYSTEM, *TURNS]) if pieces.system else ([TURNS[0]], TURNS):
        expected = export._rendered(tokenizer, chat, True)
        assert ollama.execute(template, chat) == expected.removeprefix(tokenizer.bos_token or "")


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), min_size=6, max_size=6))
def test_any_text_around_the_messages_comes_back(texts):
    pieces = Pieces(texts[0], (texts[1], texts[2]), texts[3], texts[4], texts[5], texts[0])
    (template,) = (v for n, v in ollama.parse(modelfile("x.gguf", pieces, [], None)) if n == "template")
    for chat in ([TURNS[0]], TURNS, [SYSTEM, *TURNS]):
        assert ollama.execute(template, chat) == pieces.text(chat)


@pytest.mark.parametrize(
    "text", ["TEMPLATE a\n", "FRM x\n", 'FROM x\nTEMPLATE """a\n', "FROM x\nPARAMETER stop-at 1\n"]
)
def test_the_parser_refuses_what_ollama_refuses(text):
    with pytest.raises(ValueError):
        ollama.parse(text)


@pytest.mark.parametrize("tokens", ["byte_level", "sentencepiece", "metaspace"])
def test_a_file_that_writes_other_conversations_is_refused(tmp_path, tokens, monkeypatch):
    folder = merged(tmp_path / "merge", tokens=tokens)
    run(folder, tmp_path / "fine", "f16")
    right = gguf_writer.read_facts

    def changed(**other):
        return lambda path: {**right(path), **other}

    facts = right(tmp_path / "fine" / "model-f16.gguf")
    assert facts["strings"]["eos_token"]
    for number, (other, words) in enumerate(
        (
            ({"template": facts["template"] + "!"}, "its chat template writes"),
            ({"template": None}, "no chat template"),
            ({"terminators": [0]}, "ends an answer"),
        )
    ):
        monkeypatch.setattr("finetune.gguf.chat.read_facts", changed(**other))
        with pytest.raises(GateRefused, match=words):
            run(folder, tmp_path / f"other{number}", "f16")


def test_the_template_that_was_trained_decides(tmp_path):
    folder = merged(tmp_path / "merge")
    render = tmp_path / "render" / "template"
    render.mkdir(parents=True)
    (render / "inference.jinja").write_text(CHATML.replace("<|im_start|>", "<|start|>", 1))
    write_json(render / "template.json", {"terminators": [1]})
    (tmp_path / "out").mkdir()
    spec = export.Spec(export={"gguf": ["f16"], "perplexity_rows": 0}, tokens=1)
    from tests.stages.finished import context

    with pytest.raises(GateRefused, match="does not write conversations as they were trained"):
        export.run(spec, {"merge": folder, "render": tmp_path / "render"}, tmp_path / "out", context(tmp_path / "out"))


ASKED = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{%- generation -%} {{ m.content }} {%- endgeneration %}\n{% endfor %}",
        "{% for m in messages %}\n  {% generation %}\n  {{ m.content }}\n  {% endgeneration %}\n{% endfor %}",
        *(
            "{{ {'b': '\u65e5', 'a': [1]}|tojson(%s) }}%s" % (options, ASKED)  # noqa: UP031 - braces
            for options in ("", "true", "indent=2", "sort_keys=true, ensure_ascii=true", "separators=(',', ':')")
        ),
    ],
)
def test_every_part_of_a_template_that_transformers_takes_is_taken(tmp_path, template, monkeypatch):
    folder = merged(tmp_path / "merge")
    (folder / "chat_template.jinja").write_text(template)
    run(folder, tmp_path / "fine", "f16")
    right = gguf_writer.read_facts
    other = template.replace("m.content", "m.content + '!'")
    monkeypatch.setattr("finetune.gguf.chat.read_facts", lambda path: {**right(path), "template": other})
    with pytest.raises(GateRefused, match="its chat template writes"):
        run(folder, tmp_path / "other", "f16")


LOOPS = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("condition", ["true", "'Be brief.' in messages|string"], ids=["always", "once"])
def test_a_template_without_end_is_refused(tmp_path, condition, monkeypatch):
    """One trial finds it before anything is written; the other needs a conversation that the trial does not have."""
    monkeypatch.setattr(template_sandbox, "CPU_SECONDS", 1)
    monkeypatch.setattr(template_sandbox, "ROW_SECONDS", 0.2)
    folder = merged(tmp_path / "merge")
    template = f"{{% if {condition} %}}{LOOPS}{{% endif %}}{{{{ messages[0].content }}}}"
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match=r"does not (end within|finish in the allowed time)"):
        run(folder, tmp_path / "out", "f16")
    assert any((tmp_path / "out").iterdir()) == (condition != "true")
    facts = {"template": template, "strings": {}, "terminators": []}
    monkeypatch.setattr("finetune.gguf.chat.read_facts", lambda path: facts)
    (found,) = differences(tmp_path, lambda chat: chat[0]["content"], [])
    assert "its chat template writes 'nothing (it refuses" in found


def test_a_system_message_in_the_last_question_stands_there_for_ollama_too():
    def render(chat, prompt):
        system = next((m["content"] + "\n\n" for m in chat if m["role"] == "system"), "")
        turns = [m for m in chat if m["role"] != "system"]
        last = len(turns) - 1
        text = {"user": "[INST] {}[/INST]", "assistant": " {}</s>"}
        return "<s>" + "".join(
            text[m["role"]].format((system if n == last else "") + m["content"]) for n, m in enumerate(turns)
        )

    pieces = read_pieces(render)
    assert pieces is not None and pieces.system_last
    found = modelfile("x.gguf", pieces, [], "<s>")
    inside = "{{ if and $.System (eq (len (slice $.Messages $index)) 1) }}{{ $.System }}"
    assert inside in found and "{{ if .System }}" not in found


def test_a_template_that_closes_the_whole_conversation_is_read():
    def render(chat, prompt):
        return "".join(f"<{m['role']}>{m['content']}<end>" for m in chat) + ("<assistant>" if prompt else "<eos>")

    pieces = read_pieces(render)
    assert pieces is not None and pieces.end + pieces.between == "<end><user>" and "<eos>" not in pieces.end


def test_a_template_that_is_no_row_of_turns_is_left_to_ollama():
    assert read_pieces(lambda chat, prompt: f"{len(chat)} messages, " + " | ".join(m["content"] for m in chat)) is None
    assert "TEMPLATE" not in modelfile("x.gguf", None, ["</s>"], "<s>")
    assert "\\u0022\\u0022\\u0022" in modelfile("x.gguf", Pieces('"""', None, "", "", "", ""), [], None)
