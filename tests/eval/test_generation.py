"""Answers do not depend on the batch; sampling follows the distribution it is asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from finetune.context import Context, StopFlag
from finetune.errors import Stopped
from finetune.eval.generation import Request, Sampling, answer, draw, greedy
from finetune.recipe import Runtime, Tracking
from tests.helpers.tiny_models import VOCABULARY, load, save_tiny

ENDS, PAD = (2, 7), 0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(save_tiny(tmp_path_factory.mktemp("base") / "base"))  # fp32


@pytest.fixture(scope="module")
def requests():
    chance = np.random.default_rng(0)
    return [
        Request(chance.integers(8, VOCABULARY, int(n)), int(m), stream=i)
        for i, (n, m) in enumerate(zip(chance.integers(1, 40, 14), chance.integers(1, 30, 14), strict=True))
    ]


def context(tmp_path, stop=None):
    return Context(tmp_path, Runtime(), Tracking(), device="cpu", stop=stop or StopFlag())


def answers(model, requests, sampling, batch_tokens, tmp_path):
    found = {}
    for done in answer(model, requests, sampling, ENDS, PAD, context(tmp_path), batch_tokens):
        assert not found.keys() & done.keys()
        found |= done
    return [(found[i].ids, found[i].finish) for i in range(len(requests))]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(1.7, 0.9)], ids=["greedy", "all", "top-p"])
def test_the_batch_size_changes_no_answer(model, requests, sampling, tmp_path):
    alone = answers(model, requests, sampling, 1, tmp_path)
    for batch_tokens in (90, 300, 10_000):
        assert answers(model, requests, sampling, batch_tokens, tmp_path) == alone
    assert answers(model, requests[::-1], sampling, 300, tmp_path) == alone[::-1]
    assert all(len(ids) <= r.limit for (ids, _), r in zip(alone, requests, strict=True))
    assert {finish for _, finish in alone} == {"stop", "length"} and any(len(ids) for ids, _ in alone)


def test_greedy_is_the_likeliest_token_of_a_forward_without_cache(model, requests, tmp_path):
    (first, *_), limit = requests, 12
    ids = list(map(int, first.prompt))
    for _ in range(limit):
        with torch.no_grad():
            token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in ENDS:
            break
        ids.append(token)
    (found,) = greedy(model, [first.prompt], [limit], ENDS, PAD, context(tmp_path))
    assert found.ids == ids[len(first.prompt) :]


def test_another_stream_gives_another_answer_and_the_same_the_same(model, requests, tmp_path):
    prompt = requests[0].prompt
    several = [Request(prompt, 20, stream) for stream in (1, 2, 1)]
    one, two, again = answers(model, several, Sampling(1.0), 1000, tmp_path)
    assert one == again != two


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6), (2.0, 0.9)])
def test_what_is_drawn_has_the_distribution_asked_for(temperature, top_p):
    scores = torch.tensor([2.0, 0.0, 1.0, -1.0, 2.0, -30.0])
    count = 40_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count  # every part of [0, 1) alike: no chance is left
    found = draw(scores.expand(count, -1), uniform, Sampling(temperature, top_p))
    chances = torch.softmax(scores.double() / temperature, -1).numpy()
    order = np.argsort(-chances, kind="stable")
    kept = order[: int(np.searchsorted(np.cumsum(chances[order]), top_p) + 1)]
    expected = np.zeros(6)
    expected[kept] = chances[kept] / chances[kept].sum()
    assert np.abs(np.bincount(found.numpy(), minlength=6) / count - expected).max() < 1e-4


def test_the_ends_of_the_interval_draw_tokens_that_can_be(tmp_path):
    scores = torch.tensor([[-1e9, 0.0, 0.0, -1e9]] * 2)
    uniform = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(scores, uniform, Sampling(1.0)).tolist() == [1, 2]


def test_a_signal_ends_a_generation_between_two_tokens(model, requests, tmp_path):
    stop = StopFlag()
    made = []

    def hook(*_):
        made.append(1)
        stop.signal_number = 15 if len(made) > 3 else 0

    handle = model.register_forward_hook(hook)
    try:
        with pytest.raises(Stopped):
            list(answer(model, requests, Sampling(), ENDS, PAD, context(tmp_path, stop), 10_000))
    finally:
        handle.remove()
    assert len(made) <= 5


def test_a_batch_that_does_not_fit_is_halved(model, requests, tmp_path, monkeypatch):
    expected = answers(model, requests, Sampling(), 10_000, tmp_path)
    generate, sizes = model.generate, []

    def small(**given):
        sizes.append(len(given["input_ids"]))
        if sizes[-1] > 3:
            raise torch.cuda.OutOfMemoryError("full")
        return generate(**given)

    monkeypatch.setattr(model, "generate", small)
    assert answers(model, requests, Sampling(), 10_000, tmp_path) == expected
    assert max(sizes) == 14 and sum(n for n in sizes if n <= 3) == 14
    monkeypatch.setattr(model, "generate", lambda **_: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("full")))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        answers(model, requests[:1], Sampling(), 10_000, tmp_path)
