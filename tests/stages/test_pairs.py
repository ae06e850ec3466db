"""The stage pairs as the pipeline runs it, on real small tokenizers: what it writes, each gate firing and silent."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from finetune.context import Context
from finetune.data.records import Example, Message, write_rows
from finetune.errors import GateRefused, InputError
from finetune.recipe import Runtime, Tracking
from finetune.recipe.load import parse_recipe
from finetune.stages import pairs
from finetune.utils.files import read_json
from tests.helpers.base_templates import ALL
from tests.helpers.tiny_tokenizers import build

HEAD = "schema: 1\nname: a\nmodel: builtin:tiny-mistral\ndata:\n  - source: pydoc\nrender: {max_length_tokens: 400}\n"
PLACES = ("France", "Köln", "the sea", "Paris", "poem", "three", "blue", "capital", "assistant", "number")
CHATML = ALL["chatml"]


def pair(number, **more):
    place = PLACES[number % 10]
    return {
        "prompt": f"What is number {number} of {place}, and why does {place} count {number * 7}?",
        "chosen": f"It is {number}: {place} is wide and blue, as {number * 3} says.",
        "rejected": f"One cannot know {place}; {number * 5} perhaps, or a poem.",
        **more,
    }


def judged(number, label, **more):
    one = pair(number)
    return {"prompt": one["prompt"], "completion": one["chosen" if label else "rejected"], "label": label, **more}


class Work:
    """A folder with a base, and the stage run on rows."""

    def __init__(self, folder: Path, kind="byte_level", template=CHATML):
        self.folder, self.lines, self.runs = folder, [], 0
        build(kind, template).save_pretrained(folder / "base")
        self.inputs = {"base": folder / "base"}

    def hold(self, *rows):
        (self.folder / "split").mkdir()
        write_rows(self.folder / "split" / "eval.parquet", rows)
        self.inputs["split"] = self.folder / "split"

    def run(self, rows, *, section="", more="", eval_rows=None):
        self.runs += 1
        here = self.folder / f"run{self.runs}"
        here.mkdir()
        files = rows if isinstance(rows, dict) else {"rows.jsonl": rows}
        text = HEAD + "preference:\n  data:\n"
        for name, content in files.items():
            (here / name).write_text("".join(json.dumps(r) + "\n" for r in content))
            text += f"    - {{source: local, path: {name}}}\n"
        if eval_rows is not None:
            (here / "held.jsonl").write_text("".join(json.dumps(r) + "\n" for r in eval_rows))
            text += "  eval_data:\n    - {source: local, path: held.jsonl}\n"
        (here / "recipe.yaml").write_text(text + section + more)
        recipe = parse_recipe(text + section + more, here / "recipe.yaml")
        spec, out = pairs.spec(recipe), here / "out"
        out.mkdir()
        pairs.fingerprint(spec)
        context = Context(scratch=here, runtime=Runtime(), tracking=Tracking(), say=self.lines.append)
        return pairs.run(spec, self.inputs, out, context), out


@pytest.fixture
def work(tmp_path):
    return Work(tmp_path)


def table(path):
    return pq.read_table(path).to_pylist()


def rejects(out):
    return {row["id"]: row["reason"] for row in table(out / "rejects.parquet")}


def test_without_a_preference_section_the_stage_is_off():
    assert pairs.spec(parse_recipe(HEAD, Path("a.yaml"))) is None


def test_pairs_are_written_as_the_contract_says(work):
    metrics, out = work.run([pair(i) for i in range(40)])
    train, held = table(out / "train.parquet"), table(out / "eval.parquet")
    assert len(train) == metrics["rows"] == 38 and len(held) == metrics["eval_rows"] == 2
    assert [f.name for f in pq.read_schema(out / "train.parquet")] == [
        "pair_id", "source", "prompt_ids", "chosen_ids", "rejected_ids", "chosen_mask", "rejected_mask",
    ]  # fmt: skip
    types = {f.name: str(f.type) for f in pq.read_schema(out / "train.parquet")}
    assert types["prompt_ids"] == types["chosen_ids"] == "list<element: int32>"
    assert types["chosen_mask"] == "list<element: int8>"
    audit, facts = read_json(out / "audit.json"), read_json(out / "template" / "template.json")
    assert audit["splits"]["train"]["pairs"] == 38 and audit["ids_equal"] == 80 and audit["prompts_proved"] == 80
    assert facts["terminators"] == audit["terminators"] and facts["pad_token"]
    assert not rejects(out) and metrics["leaks"] == 0 and metrics["contradictions"] == 0
    texts = {row["pair_id"]: row for row in table(out / "texts.parquet")}
    assert json.loads(texts["rows.jsonl:1"]["chosen"]) == [{"role": "assistant", "content": pair(0)["chosen"]}]


@pytest.mark.parametrize(
    ("kind", "name"), [("byte_level", "chatml"), ("metaspace", "zephyr"), ("sentencepiece", "mistral_card")]
)
def test_ids_are_those_of_apply_chat_template_and_labels_the_answer_with_its_end(tmp_path, kind, name):
    work = Work(tmp_path, kind, ALL[name])
    rows = [pair(i) for i in range(30)]
    _, out = work.run(rows)
    tokenizer = build(kind, ALL[name])
    for row in [*table(out / "train.parquet"), *table(out / "eval.parquet")]:
        raw = rows[int(row["pair_id"].rpartition(":")[2]) - 1]
        asked = [{"role": "user", "content": raw["prompt"]}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        for side in ("chosen", "rejected"):
            ids, mask = row[f"{side}_ids"], row[f"{side}_mask"]
            chat = [*asked, {"role": "assistant", "content": raw[side]}]
            assert row["prompt_ids"] + ids == tokenizer.apply_chat_template(chat, return_dict=False)
            labels = [i for i, m in zip(ids, mask, strict=True) if m]
            assert tokenizer.decode(labels, skip_special_tokens=True).strip() == raw[side]
            assert tokenizer.added_tokens_decoder[labels[-1]].special and mask[: len(labels)] == [1] * len(labels)
        assert row["prompt_ids"] == prompt or row["prompt_ids"] == list(prompt)


def contents(out):
    return [
        sorted((r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]) for r in table(out / f"{split}.parquet"))
        for split in ("train", "eval")
    ]


def test_the_order_of_rows_and_shards_changes_nothing(work):
    rows = [pair(i) for i in range(40)] + [pair(i, chosen=pair(i)["chosen"].upper()) for i in range(5)]
    rows += [pair(7), pair(9, prompt=pair(8)["prompt"])]
    _, one = work.run(rows)
    shuffled = random.Random(3).sample(rows, len(rows))
    _, other = work.run({"a.jsonl": shuffled[:11], "b.jsonl": shuffled[11:]})
    assert contents(one) == contents(other)
    assert sorted(rejects(one).values()) == sorted(rejects(other).values()) != []


def test_the_same_rows_give_the_same_bytes(work):
    outs = [work.run([pair(i) for i in range(30)])[1] for _ in range(2)]
    names = sorted(p.relative_to(outs[0]) for p in outs[0].rglob("*") if p.is_file())
    assert len(names) == 8
    assert all((outs[0] / n).read_bytes() == (outs[1] / n).read_bytes() for n in names)


def test_kto_takes_labels_as_they_are_and_pairs_apart(work):
    rows = [judged(i, i % 2 == 0) for i in range(30)] + [judged(30, "1"), judged(31, 0.0)]
    metrics, out = work.run(rows, section="  method: kto\n  min_accuracy: null\n")
    train = table(out / "train.parquet")
    assert {r["label"] for r in train} == {True, False} and metrics["labels"] == {
        str(v).lower(): sum(r["label"] is v for r in train) for v in (False, True)
    }
    assert list(train[0]) == ["pair_id", "source", "prompt_ids", "completion_ids", "completion_mask", "label"]
    _, apart = work.run([pair(i) for i in range(30)], section="  method: kto\n")
    found = {r["pair_id"]: r["label"] for n in ("train", "eval") for r in table(apart / f"{n}.parquet")}
    assert len(found) == 60 and found["rows.jsonl:1+"] is True and found["rows.jsonl:1-"] is False
    # both answers of a prompt are on one side of the split
    held = {r["pair_id"][:-1] for r in table(apart / "eval.parquet")}
    assert held and not held & {r["pair_id"][:-1] for r in table(apart / "train.parquet")}


def test_held_out_answers_of_one_label_cannot_be_measured_and_are_refused_before_training(work):
    rows, held = [judged(i, i % 2 == 0) for i in range(30)], [judged(i, 1) for i in range(40, 44)]
    with pytest.raises(GateRefused, match=r"held-out answers all have one label.*min_accuracy: null"):
        work.run(rows, section="  method: kto\n", eval_rows=held)
    work.run(rows, section="  method: kto\n", eval_rows=[*held, judged(44, 0)])
    work.run(rows, section="  method: kto\n  min_accuracy: null\n", eval_rows=held)


def test_a_label_that_is_neither_0_nor_1_is_refused_with_its_row(work):
    with pytest.raises(InputError, match=r"\[rows.jsonl:3\] label: found the number 2, allowed is 0 or 1"):
        work.run([judged(0, 1), judged(1, 0), judged(2, 2)], section="  method: kto\n")


def test_answers_of_one_label_only_are_refused(work):
    with pytest.raises(GateRefused, match=r"all 20 answers have the label true \(rows.jsonl:1"):
        work.run([judged(i, 1) for i in range(20)], section="  method: kto\n")
    # and where only what is left has one label
    rows = [judged(i, 1) for i in range(20)] + [judged(20, 0, completion="x " * 500)]
    with pytest.raises(GateRefused, match=r"one label:\n  1 × too_long \(rows.jsonl:21"):
        work.run(rows, section="  method: kto\n")


def test_pairs_that_teach_nothing_are_left_out_with_a_reason(work):
    rows = [pair(i, score_chosen=8, score_rejected=4) for i in range(20)]
    rows += [pair(20, score_chosen=5, score_rejected=5), pair(21, score_chosen=1, score_rejected=3)]
    rows += [pair(22, rejected=pair(22)["chosen"]), pair(0), pair(23, rejected="no " * 400)]
    metrics, out = work.run(rows)
    assert rejects(out) == {
        "rows.jsonl:21": "tied_scores", "rows.jsonl:22": "scores_reversed", "rows.jsonl:23": "no_difference",
        "rows.jsonl:24": "duplicate", "rows.jsonl:25": "too_long",
    }  # fmt: skip
    assert metrics["dropped"] == 5 and metrics["rows"] + metrics["eval_rows"] == 20
    long = next(r for r in table(out / "rejects.parquet") if r["reason"] == "too_long")
    assert long["limit"] == 400 < long["value"]


def test_too_many_left_out_pairs_are_refused_with_reasons_and_a_first_row(work):
    rows = [pair(i) for i in range(10)] + [pair(0)] * 11
    with pytest.raises(GateRefused, match=r"11 of 21 are left out.*max_dropped_fraction 0.5:\n  11 × duplicate \(rows"):
        work.run(rows)
    work.run(rows, section="  max_dropped_fraction: 0.6\n  eval_fraction: 0.2\n")


def test_nothing_left_is_refused_with_reasons(work):
    tied = [pair(i, score_chosen=1, score_rejected=1) for i in range(4)]
    with pytest.raises(GateRefused, match=r"no pair to train on is left of 4 rows:\n  4 × tied_scores \(rows"):
        work.run(tied)


def test_contradictions_are_listed_and_both_left_out(work):
    turned = {**pair(3), "chosen": pair(3)["rejected"] + " ", "rejected": pair(3)["chosen"].upper()}
    metrics, out = work.run([*(pair(i) for i in range(30)), turned])
    assert rejects(out) == {"rows.jsonl:4": "contradiction", "rows.jsonl:31": "contradiction"}
    assert metrics["contradictions"] == 2
    detail = {r["id"]: r["detail"] for r in table(out / "rejects.parquet")}
    assert detail["rows.jsonl:4"] == "rows.jsonl:31 prefers the other answer to the same prompt"
    rows = [judged(i, i % 2 == 0) for i in range(30)]
    _, out = work.run([*rows, {**rows[0], "label": False}], section="  method: kto\n  min_accuracy: null\n")
    assert rejects(out) == {"rows.jsonl:1": "contradiction", "rows.jsonl:31": "contradiction"}


def test_prompts_and_answers_of_held_out_sft_rows_are_not_trained_on(work):
    def row(number, *texts):
        return Example(
            f"sft:{number}", "sft", tuple(Message(("user", "assistant")[i % 2], t) for i, t in enumerate(texts))
        )

    near = pair(5)["prompt"] + " Please"
    work.hold(
        row(1, pair(3)["prompt"].upper(), "Another answer."),
        row(2, near, "Something else."),
        row(3, "Hello there.", "Hi.", pair(7)["prompt"].split("\n")[0], "A third."),
        row(4, "What else?", pair(9)["chosen"]),
    )
    _, out = work.run([pair(i) for i in range(30)])
    assert rejects(out) == {"rows.jsonl:4": "held_out", "rows.jsonl:6": "held_out", "rows.jsonl:10": "held_out"}
    detail = {r["id"]: r["detail"] for r in table(out / "rejects.parquet")}
    assert "its prompt is that of sft:1" in detail["rows.jsonl:4"] and "the same text" in detail["rows.jsonl:4"]
    assert "its answer is that of sft:4" in detail["rows.jsonl:10"]


def test_pairs_that_share_text_with_evaluation_data_are_left_out(work):
    rows = [pair(i) for i in range(30)]
    quoted = "the quick brown fox of seven words jumps over the lazy dogs of the whole village"
    rows[4]["rejected"] = f"So {quoted.upper()}!"
    rows[6]["chosen"] = f"It is said: {quoted}."
    (work.folder / "test.jsonl").write_text(
        json.dumps({"instruction": "Q?", "output": f"A. {quoted}"})
        + "\n"
        + json.dumps({"instruction": pair(8)["prompt"].upper(), "output": "B."})
    )
    against = f"decontaminate:\n  against: [{{source: local, path: {work.folder / 'test.jsonl'}}}]\n"
    metrics, out = work.run(rows, more=against)
    assert rejects(out) == dict.fromkeys(("rows.jsonl:5", "rows.jsonl:7", "rows.jsonl:9"), "contaminated")
    detail = {r["id"]: r["detail"] for r in table(out / "rejects.parquet")}
    assert detail["rows.jsonl:9"].endswith("with test.jsonl:2 of the evaluation data")
    assert "the quick brown fox" in detail["rows.jsonl:5"] and metrics["dropped_because"] == {"contaminated": 3}
    # held-out pairs of the user's own are evaluation data themselves
    _, out = work.run(rows[10:], eval_rows=[rows[8]], more=against)
    assert not rejects(out)
    # by vectors, each part of a pair taken apart; and a recipe without the section keeps its key
    close = [*rows[:8], pair(8, prompt=pair(8)["prompt"].replace("What is", "Tell me")), *rows[10:]]
    _, out = work.run(close, section="  method: kto\n", more=against + "  ngram: 40\n  embedding_threshold: 0.8\n")
    assert rejects(out) == dict.fromkeys(("rows.jsonl:9+", "rows.jsonl:9-"), "contaminated")


def test_your_own_held_out_pairs_stay_whole_and_their_prompts_are_not_trained_on(work):
    held = [pair(i) for i in (2, 50, 51)]
    metrics, out = work.run([pair(i) for i in range(20)], eval_rows=held)
    assert [r["pair_id"] for r in table(out / "eval.parquet")] == ["held.jsonl:1", "held.jsonl:2", "held.jsonl:3"]
    assert rejects(out) == {"rows.jsonl:3": "held_out"} and metrics["rows"] == 19


def test_near_duplicate_prompts_stay_on_one_side(work):
    rows = [pair(i, prompt=pair(i)["prompt"] + end) for i in range(20) for end in ("", " ", " now")]
    for number, row in enumerate(rows):
        row["chosen"] += f" ({PLACES[number % 7]} {number})"
    _, out = work.run(rows, section="  eval_fraction: 0.3\n")
    sides = {}
    for split in ("train", "eval"):
        for r in table(out / f"{split}.parquet"):
            sides.setdefault((int(r["pair_id"].rpartition(":")[2]) - 1) // 3, set()).add(split)
    assert {frozenset(s) for s in sides.values()} == {frozenset({"train"}), frozenset({"eval"})}


def test_one_pair_a_prompt_where_the_recipe_asks_for_it(work):
    rows = [pair(i) for i in range(20)] + [
        pair(i, prompt=pair(i)["prompt"]) | {"chosen": f"Quite another {i * 11}."} for i in range(3)
    ]
    _, out = work.run(rows)
    assert not rejects(out)
    _, out = work.run(rows, section="  repeats: prompt\n")
    assert set(rejects(out).values()) == {"prompt_repeated"} and len(rejects(out)) == 3


def test_the_filter_looks_at_the_wanted_answer_only(work):
    rows = [pair(i) for i in range(20)] + [pair(20, chosen="secret word"), pair(21, rejected="secret word")]
    _, out = work.run(rows, more="filter: {drop_matching: [secret]}\n")
    assert rejects(out) == {"rows.jsonl:21": "drop_matching"}


def test_length_bias_is_reported_and_refused_above_the_limit(work):
    rows = [pair(i, chosen=pair(i)["chosen"] + " and more" * 9) for i in range(20)]
    metrics, _ = work.run(rows)
    assert metrics["length_bias"] == 1.0
    with pytest.raises(GateRefused, match=r"in 100.0% of the pairs the chosen answer is the longer one \(as in rows"):
        work.run(rows, section="  max_length_bias: 0.8\n")
    mixed = rows[:10] + [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows[10:]]
    assert 0.4 <= work.run(mixed, section="  max_length_bias: 0.8\n")[0]["length_bias"] <= 0.6


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "What?", "chosen": "A.", "rejected": ""}, "rejected: found the text '', allowed is a text"),
        ({"prompt": "What?", "chosen": None, "rejected": "B."}, "chosen: found null"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: x\n\nAssistant: y"},
            "chosen: found turn 1 is user: 'a' in one and user: 'x' in the other",
        ),
    ],
)
def test_rows_that_are_no_pairs_stop_with_the_row_and_the_reason(work, row, reason):
    with pytest.raises(InputError) as error:
        work.run([pair(i) for i in range(20)] + [row])
    assert f"[rows.jsonl:21] {reason}" in str(error.value)
    metrics, out = work.run([pair(i) for i in range(20)] + [row], more="ingest: {max_refused_fraction: 0.1}\n")
    assert metrics["refused"] and "rows.jsonl:21" in rejects(out)


def test_one_answer_alone_is_no_pair_for_dpo(work):
    with pytest.raises(InputError, match="single answers with a label, and dpo needs pairs; set method: kto"):
        work.run([judged(i, 1) for i in range(3)])


def test_a_template_without_an_end_is_refused(tmp_path):
    open_end = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    work = Work(tmp_path, template=open_end + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    with pytest.raises(GateRefused, match="no token that ends an answer"):
        work.run([pair(i) for i in range(20)])


def test_only_what_the_stage_reads_is_in_its_key():
    from finetune.recipe.keys import key_form

    text = HEAD + "preference:\n  data:\n    - {source: pydoc, format: preference}\n"
    forms = [
        key_form(pairs.spec(parse_recipe(text + more, Path("a.yaml")))) for more in ("", "  beta: 0.2\n  epochs: 3\n")
    ]
    assert forms[0] == forms[1]
    assert forms[0] != key_form(pairs.spec(parse_recipe(text + "  eval_fraction: 0.1\n", Path("a.yaml"))))
