"""Answers to prompts: several samples each, of which one is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.eval.answer_metrics import words
from finetune.serve.client import Reply
from finetune.synth.asking import Ask, stream
from finetune.synth.job import Job
from finetune.synth.judge import Pair, compare
from finetune.synth.seeds import Seed
from finetune.synth.similarity import rouge_l

VERDICT_TOKENS = 512


@dataclass(frozen=True)
class Prompt:
    """A conversation to be answered; `name` is its place in the lineage, which also decides its random stream."""

    name: str
    messages: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Best:
    """The answer that was kept; `agreement` is its mean ROUGE-L with the other samples."""

    text: str
    agreement: float | None = None


def answer_seeds(job: Job, seeds: Sequence[Seed]) -> None:
    """Make a row of every seed, in their order, until `rows` are made."""
    todo, wanted = list(seeds), job.section.rows or len(seeds)
    while todo and len(job.made) < wanted:  # what is left out is made up for by later seeds
        here, todo = todo[: wanted - len(job.made)], todo[wanted - len(job.made) :]
        for chunk in job.chunks(here, 1):
            prompts = [Prompt(seed.id, seed.messages) for seed in chunk]
            for seed, best in zip(chunk, answer(job, prompts), strict=True):
                if best is not None:
                    agreed = {} if best.agreement is None else {"agreement": round(best.agreement, 4)}
                    job.make(seed.messages, best.text, seed.id, "answer", round=1, **agreed)


def answer(job: Job, prompts: Sequence[Prompt]) -> list[Best | None]:
    """Return the best answer to each prompt; None if none can be used: it is among the rejects then."""
    section = job.section
    asks = [
        Ask(
            p.messages,
            section.max_new_tokens,
            section.temperature,
            section.top_p,
            stream(job.seed, "answer", p.name, n),
        )
        for p in prompts
        for n in range(section.samples)
    ]
    replies = job.asker.ask_all(asks, "answers")
    candidates = []
    for k, prompt in enumerate(prompts):
        own = replies[k * section.samples : (k + 1) * section.samples]
        candidates.append(_usable(job, prompt, own))
    if section.samples == 1:
        return [Best(texts[0]) if texts else None for texts in candidates]
    if section.best == "agreement":
        return [_most_alike(texts) if texts else None for texts in candidates]
    return _judged(job, prompts, candidates)


def _usable(job: Job, prompt: Prompt, replies: Sequence[Reply | None]) -> list[str]:
    return [r.text.strip() for r in replies if not job.unfinished(f"{prompt.name}/answer", r) and r is not None]


def _most_alike(answers: Sequence[str]) -> Best:
    """Return the answer with the highest mean ROUGE-L to the others: of equal answers the most frequent one wins."""
    split = [words(text) for text in answers]
    if len(answers) == 1:
        return Best(answers[0])
    means = [
        sum(rouge_l(one, other) for j, other in enumerate(split) if j != i) / (len(split) - 1)
        for i, one in enumerate(split)
    ]
    return Best(answers[means.index(max(means))], max(means))


def _judged(job: Job, prompts: Sequence[Prompt], candidates: Sequence[list[str]]) -> list[Best | None]:
    """Return the winners: each next answer meets the best so far, and takes its place only by a better score."""
    best: list[str | None] = [texts[0] if texts else None for texts in candidates]
    for n in range(1, job.section.samples):
        there = [i for i, texts in enumerate(candidates) if len(texts) > n]
        pairs = [Pair(_question(prompts[i]), str(best[i]), candidates[i][n]) for i in there]
        verdicts = compare(job.asker, job.prompts, pairs, VERDICT_TOKENS, "verdicts")
        for i, verdict in zip(there, verdicts, strict=True):
            if (verdict.score or 0) > 0.5:
                best[i] = candidates[i][n]
    return [None if text is None else Best(text) for text in best]


def _question(prompt: Prompt) -> str:
    if len(prompt.messages) == 1:
        return prompt.messages[0]["content"]
    return "\n\n".join(f"{m['role'].upper()}: {m['content']}" for m in prompt.messages)
