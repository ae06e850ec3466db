"""Evol-Instruct (WizardLM, arXiv:2304.12244): instructions made harder (in depth) or varied (in breadth), in rounds."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from finetune.data.text import normalised
from finetune.eval.answer_metrics import words
from finetune.serve.client import Reply
from finetune.synth.answers import Prompt, answer
from finetune.synth.asking import ask_user, stream
from finetune.synth.job import Job
from finetune.synth.seeds import Seed

IN_DEPTH = ("add_constraints", "deepen", "concretize", "increase_reasoning", "complicate_input")
OPERATIONS = (*IN_DEPTH, "breadth")  # each is as likely as any other, as in the paper
EQUAL_TOKENS = 16
SHORT_REFUSAL_WORDS = 80
COPIED_WORDS = 6  # in a row, of the prompt around the instruction
# Words of our prompts that no instruction has by itself (recipes/prompts/evol_*.jinja mark their parts by them).
MARKS = re.compile(
    r"#\s*(given|new|rewritten|created)\s+(prompt|instruction)|\b(given|rewritten|created) prompt\b", re.I
)
EQUAL = re.compile(r"[\W_]*equal\b", re.I)  # at the start of the reply; anything else passes


@dataclass
class Line:
    """A line of descent: its seed, and the newest instruction of it that passed."""

    seed: Seed
    instruction: str
    parent: str
    used: bool = False

    def name(self, round_number: int, operation: str) -> str:
        """The name of a step, which decides its random stream."""
        return f"{self.seed.id}/{round_number}/{operation}"


def evolve(job: Job, seeds: Sequence[Seed]) -> None:
    """Evolve the seeds for `rounds` rounds or until `rows` are made.

    Every round has its share of `rows`. Lines that were begun go on first, so that later rounds are deeper; an
    instruction that was left out stays as it was and is tried again in the next round.
    """
    lines = [Line(seed, seed.instruction, seed.id) for seed in seeds]
    rounds = job.section.rounds
    wanted = min(job.section.rows or rounds * len(lines), rounds * len(lines))
    for number in range(1, rounds + 1):
        target = math.ceil(wanted * number / rounds)
        order = sorted(lines, key=lambda line: (not line.used, stream(job.seed, "order", number, line.seed.id)))
        while order and len(job.made) < target:  # what is left out is made up for by further lines
            missing = target - len(job.made)
            here, order = order[:missing], order[missing:]
            for chunk in job.chunks(here, number):
                _evolve(job, chunk, number)


def _evolve(job: Job, lines: Sequence[Line], number: int) -> None:
    section = job.section
    operations = [OPERATIONS[stream(job.seed, "operation", number, x.seed.id) % len(OPERATIONS)] for x in lines]
    names = [x.name(number, operation) for x, operation in zip(lines, operations, strict=True)]
    asks, prompts = [], []
    for line, operation, name in zip(lines, operations, names, strict=True):
        line.used = True
        text = job.prompts.render(
            "evol_breadth" if operation == "breadth" else "evol_depth",
            {"operation": operation, "instruction": line.instruction},
        )
        prompts.append(text)
        asks.append(
            ask_user(text, section.max_new_tokens, section.temperature, section.top_p, stream(job.seed, "evolve", name))
        )
    replies = job.asker.ask_all(asks, f"round {number}: instructions")
    steps = [
        (line, operation, name, reply.text.strip())
        for line, operation, name, prompt, reply in zip(lines, operations, names, prompts, replies, strict=True)
        if not job.unfinished(name, reply)
        and reply is not None
        and not _bad_instruction(job, line, name, prompt, reply.text)
    ]
    equal = job.asker.ask_all(
        [
            ask_user(job.prompts.render("evol_equal", {"first": line.instruction, "second": text}), EQUAL_TOKENS)
            for line, _, _, text in steps
        ],
        f"round {number}: comparisons",
    )
    gained = [step for step, reply in zip(steps, equal, strict=True) if not _no_gain(job, step[2], step[3], reply)]
    asked = [Prompt(name, (*line.seed.system, {"role": "user", "content": text})) for line, _, name, text in gained]
    for (line, operation, name, text), prompt, best in zip(gained, asked, answer(job, asked), strict=True):
        if best is None or _bad_answer(job, name, best.text):
            continue
        made = job.make(prompt.messages, best.text, line.parent, operation, round=number)
        line.instruction, line.parent = text, made.id


def _bad_instruction(job: Job, line: Line, name: str, prompt: str, text: str) -> bool:
    """Leave out an instruction that copies from the prompt, or is the one before (rules 4 and 1 of the paper)."""
    mark = MARKS.search(text)
    around = _runs(prompt.replace(line.instruction, "\n")) - _runs(line.instruction)
    copied = mark[0] if mark else min(_runs(text) & around, default="")
    if copied:
        job.reject(name, "copied_prompt", f"it holds {copied!r}, words of the evolving prompt", text)
        return True
    if normalised(text) == normalised(line.instruction):
        job.reject(name, "no_gain", "it is the instruction it was made from", text)
        return True
    return False


def _runs(text: str) -> set[str]:
    spoken = words(text)
    return {" ".join(spoken[i : i + COPIED_WORDS]) for i in range(len(spoken) - COPIED_WORDS + 1)}


def _no_gain(job: Job, name: str, text: str, reply: Reply | None) -> bool:
    """Leave out an instruction that the model calls equal to its parent (rule 1); a reply without a verdict passes."""
    if reply is None:
        return True
    if EQUAL.match(reply.text):
        job.reject(name, "no_gain", "the model calls it equal to the instruction it was made from", text)
        return True
    return False


def _bad_answer(job: Job, name: str, text: str) -> bool:
    """Leave out an instruction whose answer is an excuse, or says nothing (rules 2 and 3)."""
    spoken = words(text)
    if "sorry" in spoken and len(spoken) < SHORT_REFUSAL_WORDS:
        job.reject(name, "refusal", f"the answer says sorry and has {len(spoken)} words", text)
        return True
    if not set(spoken) - _stop_words():
        job.reject(name, "no_content", "the answer holds punctuation and stop words only", text)
        return True
    return False


@cache
def _stop_words() -> frozenset[str]:
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return frozenset(ENGLISH_STOP_WORDS)
