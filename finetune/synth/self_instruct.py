"""Self-Instruct (arXiv:2212.10560): new tasks from a model that is shown some, and an instance of each."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from finetune.eval.answer_metrics import words
from finetune.recipe.synthetic import TASKS_A_REQUEST
from finetune.serve.client import Reply
from finetune.synth.asking import Ask, ask_user, stream
from finetune.synth.job import Job
from finetune.synth.seeds import Seed
from finetune.synth.similarity import nearest

SHOWN_SEEDS, SHOWN_MADE = 6, 2  # tasks in a prompt: human and generated ones, as in the paper
FEWEST_WORDS, MOST_WORDS = 3, 150
KIND_TOKENS = 16
NUMBERED = re.compile(r"(?m)^\s*(?:task\s*)?(\d+)\s*[.):]\s*", re.I)
LAST_NUMBER = re.compile(r"(\d+)\s*[.):]\s*\Z")
CLASSIFICATION = re.compile(r"\byes\b", re.I)
PARTS = re.compile(r"(?ims)^\s*(input|output|class label)\s*:[ \t]*(.*?)(?=^\s*(?:input|output|class label)\s*:|\Z)")
NO_INPUT = ("", "none", "n/a", "no input", "<noinput>")


def write_tasks(job: Job, seeds: Sequence[Seed]) -> None:
    """Write tasks for `rounds` rounds or until `rows` are made; every round has its share of `rows`."""
    pool = [seed.instruction for seed in seeds]
    ids, compared = [seed.id for seed in seeds], [words(text) for text in pool]
    wanted, rounds = job.section.rows or 0, job.section.rounds
    for number in range(1, rounds + 1):
        missing = math.ceil(wanted * number / rounds) - len(job.made)
        requests = list(range(math.ceil(max(0, missing) / TASKS_A_REQUEST)))
        for chunk in job.chunks(requests, number):
            job.asked[number] += (TASKS_A_REQUEST - 1) * len(chunk)
            for name, parents, instruction, text, answer in _tasks(job, chunk, number, pool, ids, len(seeds), compared):
                if len(job.made) < wanted and not _repeats(job, name, instruction, compared, ids):
                    made = job.make(
                        ({"role": "user", "content": text},), answer, parents, "self_instruct", round=number
                    )
                    pool.append(instruction)
                    ids.append(made.id)
                    compared.append(words(instruction))


def _tasks(
    job: Job,
    requests: Sequence[int],
    number: int,
    pool: Sequence[str],
    ids: Sequence[str],
    seeds: int,
    compared: Sequence[Sequence[str]],
) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield name, ids of the tasks that were shown, instruction, prompt and answer of each usable new task."""
    section = job.section
    asks, examples = [], []
    for request in requests:
        chosen = _example_places(job.seed, number, request, seeds, len(pool))
        text = job.prompts.render("self_tasks", {"tasks": [pool[i] for i in chosen], "count": TASKS_A_REQUEST})
        draw = stream(job.seed, "tasks", number, request)
        asks.append(ask_user(text, section.max_new_tokens, section.temperature, section.top_p, draw))
        examples.append(", ".join(ids[i] for i in chosen))
    prompts = [str(ask.messages[-1]["content"]) for ask in asks]
    drafts: list[tuple[str, str, str]] = []
    new: list[list[str]] = []  # of this chunk: no instance is asked for that is dropped for sure
    replies = job.asker.ask_all(asks, f"round {number}: tasks")
    for request, parents, prompt, reply in zip(requests, examples, prompts, replies, strict=True):
        tasks = [] if reply is None else read_tasks(reply.text, prompt)
        for k, task in enumerate(tasks[:TASKS_A_REQUEST]):
            name = f"{number}/{request}/{k + 1}"
            ended = reply.finish if reply is not None and k + 1 == len(tasks) else "stop"  # those before it are whole
            if job.unfinished(name, Reply(task, ended)) or not _fits(job, name, task):
                continue
            if _repeats(job, name, task, [*compared, *new], ids):
                continue
            drafts.append((name, parents, task))
            new.append(words(task))
    yield from _instances(job, drafts, number)


def _example_places(seed: int, number: int, request: int, seeds: int, all_tasks: int) -> list[int]:
    """Return the tasks of one prompt: a random choice of seeds, and of generated tasks as far as there are any."""
    draw = np.random.default_rng(stream(seed, "shown", number, request))
    made = draw.choice(np.arange(seeds, all_tasks), min(SHOWN_MADE, all_tasks - seeds), replace=False).tolist()
    chosen = [*draw.choice(seeds, min(SHOWN_SEEDS + SHOWN_MADE - len(made), seeds), replace=False).tolist(), *made]
    draw.shuffle(chosen)
    return chosen


def read_tasks(text: str, prompt: str = "") -> list[str]:
    """Return the tasks of a numbered list; of a text without numbers each line that is not blank.

    The text before the first number is a task if it continues the last line of `prompt`: this number is the next one.
    """
    before, *parts = NUMBERED.split(text)
    tasks = parts[1::2] if parts else text.splitlines()
    if parts and (last := LAST_NUMBER.search(prompt)) and parts[0] == str(int(last[1]) + 1):
        tasks = [before, *tasks]
    return [task.strip() for task in tasks if task.strip()]


def _fits(job: Job, name: str, task: str) -> bool:
    count = len(words(task))
    if FEWEST_WORDS <= count <= MOST_WORDS:
        return True
    job.reject(name, "length", f"{count} words; allowed are {FEWEST_WORDS} to {MOST_WORDS}", task)
    return False


def _repeats(job: Job, name: str, task: str, others: Sequence[Sequence[str]], ids: Sequence[str]) -> bool:
    score, at = nearest(words(task), others, job.section.max_similarity)
    if at < 0:
        return False
    like = ids[at] if at < len(ids) else "a task of the same request or chunk"
    job.reject(name, "similar", f"ROUGE-L {score:.2f} with {like}", task)
    return True


def _instances(
    job: Job, tasks: Sequence[tuple[str, str, str]], number: int
) -> Iterator[tuple[str, str, str, str, str]]:
    """Ask for an instance of each task: of a classification the label first, of others the input first."""
    section = job.section
    kinds = job.asker.ask_all(
        [ask_user(job.prompts.render("self_kind", {"instruction": task}), KIND_TOKENS) for _, _, task in tasks],
        f"round {number}: kinds",
    )
    asks: list[Ask] = []
    kept = []
    for (name, parents, task), kind in zip(tasks, kinds, strict=True):
        if kind is None:
            continue
        prompt = "self_output_first" if CLASSIFICATION.search(kind.text) else "self_input_first"
        text = job.prompts.render(prompt, {"instruction": task})
        draw = stream(job.seed, "instance", name)
        asks.append(ask_user(text, section.max_new_tokens, section.temperature, section.top_p, draw))
        kept.append((name, parents, task))
    for (name, parents, task), reply in zip(kept, job.asker.ask_all(asks, f"round {number}: instances"), strict=True):
        if job.unfinished(name, reply) or reply is None:
            continue
        given, output = read_instance(reply.text)
        if not output:
            job.reject(name, "no_output", "the response has no part Output: or Class label:", reply.text)
        elif output == given:
            job.reject(name, "copied_input", "the output is the input", reply.text)
        else:
            yield name, parents, task, f"{task}\n\n{given}" if given else task, output


def read_instance(text: str) -> tuple[str, str]:
    """Return input and output of a response with the parts Input:, Output: or Class label:; empty if not there."""
    parts: dict[str, str] = {}
    for name, content in PARTS.findall(text):
        parts.setdefault("output" if name.lower() == "class label" else name.lower(), content.strip())
    given = parts.get("input", "")
    return "" if given.casefold().strip(" .()[]") in NO_INPUT else given, parts.get("output", "")
