"""A forward that pauses at each decoder layer, so that the layer's weights can be put in place.

The architecture's own code runs from the embedding to the final norm; nothing of what it hands from layer to layer is
rebuilt. It runs in a thread, because a call in the middle of a foreign forward can be suspended in no other way. Only
one thread runs at a time, and the layers themselves run in the thread of the caller: torch keeps a pool of workers for
every thread that multiplies matrices.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from finetune.errors import FinetuneError

if TYPE_CHECKING:
    import torch
    from torch import nn

_here = threading.local()  # `passage`: the one whose body runs in this thread


class _Abandoned(BaseException):
    """Raised inside a paused forward that is not wanted any more."""


class Relay:
    """Decoder layers whose calls, in the thread of a passage, are handed to the thread that drives it."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        """Put a stand-in before the forward of each of `layers`, until `remove`."""
        self._kept = [(layer, vars(layer).get("forward")) for layer in dict.fromkeys(layers)]
        for layer, _ in self._kept:
            layer.forward = partial(_relayed, layer, layer.forward)

    def remove(self) -> None:
        """Give the layers their own forward back."""
        for layer, own in self._kept:
            del layer.forward
            if own is not None:
                layer.forward = own
        self._kept = []


def _relayed(layer: nn.Module, forward: Callable[..., object], *given: object, **named: object) -> object:
    passage: Passage | None = getattr(_here, "passage", None)
    if passage is None:
        return forward(*given, **named)
    return passage.ask(layer, partial(forward, *given, **named))


class Passage:
    """One forward call of a model without its head, which stops before each decoder layer.

    `proceed(n)` runs it until layer n is about to run, or to the end if n is the number of layers.
    """

    def __init__(self, layers: Sequence[nn.Module], body: Callable[[], torch.Tensor]) -> None:
        """Prepare to call `body`, which calls each of `layers` (in a `Relay`) once, in order; nothing runs yet."""
        self._layers, self._body = layers, body
        self._reached = 0  # layers that have run
        self._wanted = True
        self._call: Callable[[], object] | None = None  # of the layer that the body waits for
        self._returned: object = None
        self._answer: torch.Tensor | None = None
        self._error: BaseException | None = None
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name="forward", daemon=True)

    def proceed(self, layer: int) -> None:
        """Run the layer that is waiting, if there is one, then continue until layer number `layer` is called.

        If `layer` is the number of layers: continue until the forward has returned. Raises what the model raised, and
        FinetuneError if it does not call each layer once, in order.
        """
        if self._call is not None:
            call, self._call = self._call, None
            self._returned = call()
        if self._thread.ident is None:
            self._thread.start()
        self._turn.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error
        ended = self._answer is not None
        if ended != (layer >= len(self._layers)) or self._reached != layer:
            raise FinetuneError(
                f"the model called {self._reached} of its {len(self._layers)} layers where layer {layer} was due; it "
                "cannot be run layer by layer: set certify: null, or merge: null to keep the adapter"
            )

    def result(self) -> torch.Tensor:
        """Return value of the body."""
        if self._answer is None:
            raise FinetuneError("the forward has not returned yet")
        return self._answer

    def abandon(self) -> None:
        """End the thread, if it still waits."""
        self._call = None
        if self._thread.is_alive():
            self._wanted = False
            self._turn.release()
            self._thread.join()

    def ask(self, layer: nn.Module, call: Callable[[], object]) -> object:
        """Called in the forward's thread: wait until the caller of `proceed` has run `call`, and return its result."""
        expected = self._layers[self._reached] if self._reached < len(self._layers) else None
        if layer is not expected:
            raise FinetuneError(
                "the model does not call each of its layers once, in order; set certify: null, or merge: null "
                "to keep the adapter"
            )
        self._call = call
        self._back.release()
        self._turn.acquire()
        if not self._wanted:
            raise _Abandoned
        self._reached += 1
        returned, self._returned = self._returned, None
        return returned

    def _run(self) -> None:
        self._turn.acquire()
        _here.passage = self
        try:
            self._answer = self._body()
        except _Abandoned:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._back.release()
