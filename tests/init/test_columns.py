"""A CSV's columns: sample values, suggestions, names that are not there, and two sides that are swapped."""

import csv
import json

import pytest

from finetune.cli import init
from finetune.errors import InputError
from finetune.init.columns import Chosen, describe, suggest, swapped
from finetune.pipeline.store import Store
from finetune.recipe.load import load_recipe

HEADER = ["ticket", "customer_message", "agent_reply", "rating"]
CHOSEN = Chosen("customer_message", "agent_reply")


@pytest.fixture
def tickets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "tickets.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [
            [f"T-{i}", f"Where is order {i}?", f"Order {i} is on its way and comes soon.", i % 5 + 1]
            for i in range(300)
        ]
        csv.writer(file).writerows([HEADER, *rows])
    return tmp_path


def write(chosen=CHOSEN, data="tickets.csv", model="builtin:tiny-mistral", **more):
    more.setdefault("force", True)
    return init.write_recipe("tickets", model, data, None, None, chosen=chosen, **more)


def test_columns_become_a_recipe_sized_to_the_rows(tickets):
    said = write(Chosen("customer_message", "agent_reply", "ticket", ("rating>=4",)), force=False)
    recipe = load_recipe("tickets.yaml").recipe
    assert recipe.data[0].columns == {"prompt": "customer_message", "completion": "agent_reply", "system": "ticket"}
    assert recipe.filter.keep_where == ["rating>=4"] and "120 of 300 rows kept" in said
    assert recipe.train.epochs * 96 / recipe.train.batch_rows >= 30 and recipe.pack is None
    assert "T-0" in said and "optimiser steps" in said and "next: " in said
    text = (tickets / "tickets.yaml").read_text()
    assert all("# " in line for line in text.splitlines()) and max(map(len, text.splitlines())) <= 120


def test_no_terminal_and_no_flags_name_the_flags_and_the_columns(tickets):
    with pytest.raises(InputError, match="--question 'customer_message' --answer 'agent_reply'") as error:
        write(Chosen())
    assert "Where is order 0?" in str(error.value) and not (tickets / "tickets.yaml").exists()


def test_a_person_is_asked_with_the_likeliest_columns_as_defaults(tickets):
    asked = []

    def ask(question, default):
        asked.append(default)
        return default

    write(Chosen(), ask=ask)
    assert asked == ["customer_message", "agent_reply", "none"]
    assert load_recipe("tickets.yaml").recipe.data[0].columns["prompt"] == "customer_message"


@pytest.mark.parametrize(
    ("chosen", "sentence"),
    [
        (Chosen("agent_reply", "customer_message"), "Swap the two sides: --question 'customer_message'"),
        (Chosen("Customer_Message", "agent_reply"), "did you mean 'customer_message'"),
        (Chosen("customer_message"), "--answer COLUMN is missing"),
        (Chosen("ticket", "ticket"), "give each its own"),
        (Chosen("customer_message", "agent_reply", None, ("rating>=9",)), "keeps none"),
        (Chosen("customer_message", "agent_reply", None, ("ratings>=4",)), "--keep ratings: no column of that name"),
        (Chosen("customer_message", "agent_reply", None, ("rating",)), "--keep 'rating'"),
    ],
)
def test_what_cannot_be_is_refused(chosen, sentence, tickets):
    with pytest.raises(InputError, match=sentence):
        write(chosen, force=False)
    assert not (tickets / "tickets.yaml").exists()


def test_a_file_that_is_not_there_is_named(tickets):
    with pytest.raises(InputError, match=r"no file .*gone\.csv"):
        write(data="gone.csv")


def test_force_keeps_two_sides_that_seem_swapped(tickets):
    write(Chosen("agent_reply", "customer_message"))
    assert load_recipe("tickets.yaml").recipe.data[0].columns["prompt"] == "agent_reply"


def test_columns_of_what_is_no_file_are_refused(tickets):
    for data in ("pydoc", "owner/rows"):
        with pytest.raises(InputError, match="columns of a file"):
            write(data=data)


HUB_BASE = "them/chat-base"


def test_a_row_is_shown_with_its_labels_for_a_base_that_cannot_be_had(tickets, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = write(model="mistralai/Mistral-7B-Instruct-v0.2", store=Store(tickets / "artifacts", tickets / "scratch"))
    assert "»Order 0 is on its way and comes soon.«" in said and "user: Where is order 0?" in said
    assert "HF_HUB_OFFLINE is set" in said


def test_the_row_is_rendered_by_the_tokenizer_of_a_base_on_the_hub(tickets, hub, monkeypatch):
    from huggingface_hub import constants

    from finetune.tiny.model import train_tokenizer

    folder = tickets / "base"
    train_tokenizer(["Order 0 is on its way. Where is order 0?"], 300).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}))
    files = {p.name: p.read_bytes() for p in folder.iterdir()} | {"model.safetensors": b"weights"}
    hub.plant(HUB_BASE, files)
    store = Store(tickets / "artifacts", tickets / "scratch")
    said = write(model=HUB_BASE, store=store)
    assert "first row as the model sees it" in said and "Order 0 is on its way and comes soon.</s>«" in said
    assert not list((tickets / "scratch").rglob("model.safetensors"))  # the weights stay where they are
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "first row as the model sees it" in write(model=HUB_BASE, store=store)  # from the cache


def test_the_row_length_can_be_chosen(tickets):
    said = write(length=24)
    assert load_recipe("tickets.yaml").recipe.render.max_length_tokens == 24
    assert "about 300 rows are longer than 24 tokens" in said
    write(data="pydoc", chosen=Chosen(), length=128)
    recipe = load_recipe("tickets.yaml").recipe
    assert (recipe.render.max_length_tokens, recipe.filter.max_length_tokens) == (128, 112)
    write(model="owner/base-instruct", length=8192)
    assert load_recipe("tickets.yaml").recipe.render.max_length_tokens == 8192
    for length in (8, 1024):
        with pytest.raises(InputError, match="--max-length-tokens"):
            write(length=length)


ROWS = [{"a": f"How do I do {i}?", "b": f"You do {i} by hand, slowly.", "n": str(i)} for i in range(20)]


def test_sides_are_told_apart_without_names():
    assert swapped("b", "a", ROWS) and not swapped("a", "b", ROWS)
    assert suggest(describe(ROWS)) == ("a", "b")
    assert suggest(describe([{"n": 1}])) == ("", "") and describe([]) == []
    assert swapped("reply", "question", []) and not swapped("question", "reply", []) and not swapped("x", "y", [])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_other_encodings_and_delimiters_are_recognised(encoding, delimiter, tickets):
    text = "\n".join(delimiter.join([f"Wo ist Päckchen {i}?", f"Das Päckchen {i} kommt über Köln."]) for i in range(40))
    (tickets / "t.csv").write_bytes(f"frage{delimiter}antwort\n{text}\n".encode(encoding))
    said = write(Chosen("frage", "antwort"), data="t.csv")
    source = load_recipe("tickets.yaml").recipe.data[0]
    assert source.encoding == (None if encoding.startswith("utf-8") else encoding) and "40 of 40 rows kept" in said


@pytest.fixture
def choices(tickets):
    """Rows with a column that means something and that no format reads, beside one that is only kept."""
    rows = [
        {
            "question": f"What is {i} + {i}?",
            "choices": ["one", "two", f"zebra {i}"],
            "answer": f"It is {2 * i}.",
            "n": i,
        }
        for i in range(60)
    ]
    for name in ("mc.jsonl", "held.jsonl"):
        (tickets / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tickets


def test_a_column_that_is_not_needed_is_left_out_by_a_flag(choices):
    said = write(Chosen(ignore=("choices",)), data="mc.jsonl", eval_data="held.jsonl")
    recipe = load_recipe("tickets.yaml").recipe
    assert recipe.ingest.ignore == ["choices"] and "zebra 0" in said and "60 of 60 rows kept" in said
    with pytest.raises(InputError, match="--ignore gone: no column of that name"):
        write(Chosen(ignore=("gone",)), data="mc.jsonl")
    write(Chosen(ignore=("choices",)), data="owner/rows")  # of the Hub, whose columns are not known yet
    assert load_recipe("tickets.yaml").recipe.ingest.ignore == ["choices"]


def test_without_a_terminal_the_column_and_its_flag_are_named(choices):
    for chosen in (Chosen(), Chosen("question", "answer")):
        with pytest.raises(InputError, match=r"choices: found a list.*here: --ignore choices"):
            write(chosen, data="mc.jsonl")
    with pytest.raises(InputError, match=r"held\.jsonl.*here: --ignore choices"):
        write(data="tickets.csv", eval_data="held.jsonl")
    assert not (choices / "tickets.yaml").exists()


def test_a_person_is_shown_the_column_and_asked(choices):
    asked = []

    def ask(question, default):
        asked.append((question, default))
        return "yes"

    write(Chosen(), data="mc.jsonl", ask=ask)
    assert load_recipe("tickets.yaml").recipe.ingest.ignore == ["choices"]
    assert "zebra 0" in asked[0][0] and "leave the column 'choices' out" in asked[0][0] and asked[0][1] == ""


def test_a_column_that_is_needed_leads_to_the_choice_of_columns(tickets):
    (tickets / "labelled.csv").write_text("text,label\n" + "".join(f"How is it {i}?,fine {i}\n" for i in range(40)))
    answers = iter(["no", "text", "label", "none"])
    write(Chosen(), data="labelled.csv", ask=lambda question, default: next(answers))
    recipe = load_recipe("tickets.yaml").recipe
    assert recipe.data[0].columns == {"prompt": "text", "completion": "label"} and recipe.ingest.ignore == []
