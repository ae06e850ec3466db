"""A forward that waits before each layer, and what happens when the model does not run them in order."""

import threading

import pytest
import torch
from torch import nn

from finetune.errors import FinetuneError
from finetune.models.paused import Passage, Relay


class Body(nn.Module):
    relay = None

    def __init__(self, order):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.order = order

    def forward(self, x):
        for index in self.order:
            x = self.layers[index](x) * 2
        return x + 1


def passage(order):
    body = Body(order)
    body.relay = Relay(list(body.layers))
    return body, Passage(list(body.layers), lambda: body(torch.ones(1, 3)))


def test_it_stops_before_each_layer_and_gives_what_the_body_gives():
    body, run = passage([0, 1, 2])
    kept = [layer.weight.data.clone() for layer in body.layers]
    for layer in body.layers:
        layer.weight.data.fill_(float("nan"))
    run.proceed(0)
    for index, layer in enumerate(body.layers):
        layer.weight.data.copy_(kept[index])
        run.proceed(index + 1)
        layer.weight.data.fill_(float("nan"))
    for layer, weight in zip(body.layers, kept, strict=True):
        layer.weight.data.copy_(weight)
    assert torch.equal(run.result(), body(torch.ones(1, 3)))  # outside of a passage layers run as ever
    body.relay.remove()
    assert not any("forward" in vars(layer) for layer in body.layers)


@pytest.mark.parametrize("order", [[1, 0, 2], [0, 0, 1, 2], [0, 1]])
def test_layers_out_of_order_left_out_or_run_twice_are_refused(order):
    _, run = passage(order)
    with pytest.raises(FinetuneError, match=r"in order|layer by layer"):
        for number in range(4):
            run.proceed(number)
    run.abandon()


def test_an_error_inside_comes_out_and_an_abandoned_one_leaves_no_thread():
    before = threading.active_count()
    body, run = passage([0, 1, 2])
    run.proceed(0)
    run.abandon()
    body, run = passage([0, 1, 2])
    run.proceed(0)
    body.layers[0].weight = nn.Parameter(torch.ones(5, 5))
    with pytest.raises(RuntimeError, match="shapes"):
        run.proceed(1)
    run.abandon()
    with pytest.raises(FinetuneError, match="not returned yet"):
        run.result()
    assert threading.active_count() == before
