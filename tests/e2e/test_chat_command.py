"""`finetune chat` as a person types it: a run's adapter and the merged model of the same run."""

import io
import json
import os
import pty
import select
import stat
import subprocess
from pathlib import Path

import pytest

from finetune.cli.chat import Conversation, Options, history_file, printable, read_question, remembering
from finetune.cli.voice import prompt_ids
from finetune.utils.files import read_json

QUESTION = "What does the tree number 3 do?"
SHORT = ("--max-new-tokens", "12")


def talk(workspace, name, lines, *options, folder):
    """The command with `lines` on stdin."""
    roots = ["--artifacts", str(workspace.folder / "artifacts"), "--scratch", str(workspace.folder / "scratch")]
    typed = "".join(line + "\n" for line in lines)
    return workspace.run("chat", name, *SHORT, *options, *roots, typed=typed, folder=folder)


def test_an_answer_cannot_steer_the_terminal():
    assert printable("a\n\tb\x1b[31m\x9b\r\x07é🙂") == "a\n\tb�[31m���é🙂"


class Terminal:
    """The command at a real terminal, as a person has it."""

    def __init__(self, workspace, folder, *arguments):
        self.main, side = pty.openpty()
        environment = workspace.environment(XDG_STATE_HOME=str(folder / "state"), TERM="dumb", COLUMNS="100")
        self.process = subprocess.Popen(
            workspace.command("chat", *arguments), stdin=side, stdout=side, stderr=side, close_fds=True, cwd=folder,
            env=environment, start_new_session=True,
        )  # fmt: skip
        os.close(side)
        self.seen = ""

    def until(self, words):
        """Read up to `words`, which are then behind us; the test's own limit ends a wait for what never comes."""
        while words not in self.seen:
            if not select.select([self.main], [], [], 60)[0]:
                raise AssertionError(f"{words!r} did not come: {self.seen!r}")
            try:
                self.seen += os.read(self.main, 4096).decode(errors="replace")
            except OSError:  # the other side is closed
                raise AssertionError(f"ended before {words!r}: {self.seen!r}") from None
        before, _, self.seen = self.seen.partition(words)
        return before

    def type(self, text):
        os.write(self.main, text.encode())


@pytest.fixture
def merged(finished):
    return finished.show()["stages"]["merge"]["path"]


def test_one_question_to_a_run_with_and_without_its_adapter(finished):
    greedy = ("--prompt", QUESTION, "--temperature", "0", *SHORT)
    done = finished.run("chat", "small", "--compare", "base", *greedy)
    assert done.stdout.startswith("adapter> ") and "\nbase> " in done.stdout
    assert "NF4" in done.stderr and "Traceback" not in done.stderr
    named = finished.run("chat", f"small@{finished.show()['run']}", *greedy)
    assert f"adapter> {named.stdout}" in done.stdout  # the same prompt and no chance: the same answer


@pytest.mark.slow
def test_the_merged_folder_answers_the_same_under_the_same_seed(finished, merged, tmp_path):
    once = finished.run("chat", merged, "--prompt", QUESTION, "--seed", "3", *SHORT).stdout
    lines = [QUESTION, "/save", "/reset", QUESTION, "/save", "/reset", "/seed 4", QUESTION, "/save"]
    talk(finished, merged, lines, "--seed", "3", folder=tmp_path)
    saved = [json.loads(line)["messages"][1]["content"] for line in (tmp_path / "chat.jsonl").open()]
    assert once.strip() == printable(saved[0]).strip() != "" and saved[0] == saved[1] != saved[2]


def test_commands_on_stdin(finished, merged, tmp_path):
    lines = [
        "/save", QUESTION, "/save", "/system Be brief.", "Say </s> now.", "and again?", "/save more.jsonl", "/reset",
        "/seed x", "/seed 5", "/bogus", "/help", "", "/quit", "never asked",
    ]  # fmt: skip
    done = talk(finished, merged, lines, folder=tmp_path)
    for sentence in (
        "the conversation is empty",
        "added to chat.jsonl",
        "/seed x: write",
        "no command /bogus",
        "a new conv",
    ):
        assert sentence in done.stderr
    (first,) = [json.loads(line) for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    assert [m["role"] for m in first["messages"]] == ["user", "assistant"]
    second = json.loads((tmp_path / "more.jsonl").read_text())["messages"]
    assert [m["role"] for m in second] == ["system", "user", "assistant", "user", "assistant"]
    assert second[1]["content"] == "Say </s> now."
    assert "never asked" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("typed", "read"), [("a\\\nb\nc\n", "a\nb"), ("a\\\n", "a\n"), ("a\n", "a")], ids=["two lines", "end", "one"]
)
def test_a_backslash_carries_a_question_over_to_the_next_line(typed, read, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    assert read_question(terminal=False) == read


@pytest.mark.slow
def test_at_a_terminal_earlier_lines_come_back(finished, merged, tmp_path):
    history = tmp_path / "state" / "finetune" / "chat_history"
    history.parent.mkdir(parents=True)
    history.write_text("the tree do?\n")
    terminal = Terminal(finished, tmp_path, merged, *SHORT)
    terminal.until("you> ")
    terminal.type("What does\\\n")
    terminal.until("...> ")
    terminal.type("\x1b[A\x1b[A\n")  # the line before this one, and the one before that
    terminal.until("you> ")
    terminal.type("/save\n")
    terminal.until("added to chat.jsonl")
    terminal.type("/quit\n")
    assert terminal.process.wait() == 0
    os.close(terminal.main)
    assert json.loads((tmp_path / "chat.jsonl").read_text())["messages"][0]["content"] == "What does\nthe tree do?"
    assert history.read_text().splitlines()[-2:] == ["/save", "/quit"]


def test_the_history_is_for_its_writer_only(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with remembering(terminal=False):
        assert not history_file().exists()
    with remembering(terminal=True):
        pass
    assert stat.S_IMODE(history_file().stat().st_mode) == 0o600


def test_a_conversation_ends_with_stdin_and_one_too_long_says_so(finished, merged, tmp_path):
    done = talk(finished, merged, ["tree " * 4000, QUESTION], "--system", "Be brief.", folder=tmp_path)
    assert "/reset it" in done.stderr and done.stdout.strip()  # the next question is answered


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nothing", "--prompt", "x"), "has not run yet"),
        (("small", "--prompt", " "), "--prompt is empty"),
        (("small", "--prompt", "x", "--compare", "other"), "allowed: base"),
        (("./gone", "--prompt", "x"), "is not a folder"),
        (("artifacts/base", "--prompt", "x"), "holds no config.json"),
    ],
)
def test_what_cannot_be_talked_to_is_refused(finished, arguments, sentence):
    refused = finished.run("chat", *arguments, status=2)
    assert sentence in refused.stderr and "Traceback" not in refused.stderr


def test_an_adapter_folder_and_a_comparison_without_base_are_refused(finished, merged):
    adapter = Path(finished.show()["stages"]["train"]["path"]) / "adapter"
    assert "without its base" in finished.run("chat", adapter, "--prompt", "x", status=2).stderr
    assert "no base" in finished.run("chat", merged, "--prompt", "x", "--compare", "base", status=2).stderr


class Buffered(io.StringIO):
    """A stdout that shows, at each flush, what was written since the last: (tokens made by then, text)."""

    def __init__(self, made):
        super().__init__()
        self.made, self.shown = made, []

    def flush(self):
        if text := self.getvalue():
            self.shown.append((len(self.made), text))
            self.seek(0)
            self.truncate()


def test_an_answer_is_shown_while_it_is_made(merged, monkeypatch):
    from finetune.cli.chat import _exchange
    from finetune.cli.voice import folder_voice
    from finetune.utils.console import Screen

    made = []  # an entry for each forward pass, and so for each token
    conversation = Conversation(None, 0)
    with folder_voice(Path(merged), Screen(silent=True)) as voice:
        voice.model.register_forward_hook(lambda *_: made.append(1))
        screen = Buffered(made)
        monkeypatch.setattr("sys.stdout", screen)
        _exchange(voice, conversation, QUESTION, Options(max_new_tokens=60))
        monkeypatch.undo()
    assert "".join(text for _, text in screen.shown).strip() == printable(conversation.messages[1]["content"])
    early = [tokens for tokens, _ in screen.shown if tokens < len(made)]
    assert early[0] <= 10 < 40 < len(made)  # the first word is read while most of the answer is still to come
    assert len(early) >= 5


def test_the_prompt_is_the_one_that_was_trained(finished, merged):
    """Token for token what the training rows begin with, and a typed control string stays text."""
    from finetune.cli.voice import folder_voice
    from finetune.data.records import read_rows
    from finetune.tokenization.token_rows import read_token_rows
    from finetune.utils.console import Screen

    stages = finished.show()["stages"]
    rows = {r.id: r for r in read_rows(Path(stages["split"]["path"]) / "train.parquet")}
    trained = read_token_rows(Path(stages["render"]["path"]) / "train.parquet", 5)
    with folder_voice(Path(merged), Screen(silent=True)) as voice:
        assert list(voice.terminators) == read_json(Path(merged) / "template.json")["terminators"]
        for row in trained:
            talked = Conversation(None, 0, [{"role": "user", "content": rows[row.id].messages[0].content}])
            assert prompt_ids(voice, talked.chat()) == row.ids[: row.answer_start].tolist()
        typed = prompt_ids(voice, [{"role": "user", "content": "</s>"}])
        assert voice.tokenizer.eos_token_id not in typed
