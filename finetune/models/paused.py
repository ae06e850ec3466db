"""A forward that pauses before each decoder layer, so that the layer's weights can be put in place.

The architecture's own code runs from the embedding to the final norm; nothing of what it hands from layer to layer is
recorded or rebuilt. It runs in a thread, because a call in the middle of a foreign forward can be suspended in no other
way; only one thread runs at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from finetune.errors import FinetuneError

if TYPE_CHECKING:
    import torch
    from torch import nn


class _Abandoned(BaseException):
    """Raised inside a paused forward that is not wanted any more."""


class Passage:
    """One call of a model's body. `proceed(n)` runs it until layer n is called, or to its end."""

    def __init__(self, layers: Sequence[nn.Module], body: Callable[[], torch.Tensor]) -> None:
        """Prepare to call `body`, which calls each of `layers` once, in order; nothing runs yet."""
        self._layers, self._body = layers, body
        self._reached = 0  # layers that have begun
        self._wanted = True
        self._answer: torch.Tensor | None = None
        self._error: BaseException | None = None
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name="forward", daemon=True)

    def proceed(self, layer: int) -> None:
        """Run on until layer number `layer` is called; behind the last one, until the body has ended.

        Raises what the body raised, and FinetuneError if it does not call the layers once, in order.
        """
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
        """What the body returned."""
        if self._answer is None:
            raise FinetuneError("the forward has not come to its end")
        return self._answer

    def abandon(self) -> None:
        """End the thread, if it still waits."""
        if self._thread.is_alive():
            self._wanted = False
            self._turn.release()
            self._thread.join()

    def _run(self) -> None:
        hooks: list[Any] = []
        self._turn.acquire()
        try:
            hooks = [layer.register_forward_pre_hook(self._pause) for layer in dict.fromkeys(self._layers)]
            self._answer = self._body()
        except _Abandoned:
            pass
        except BaseException as error:
            self._error = error
        finally:
            for hook in hooks:
                hook.remove()
            self._back.release()

    def _pause(self, layer: nn.Module, _: object) -> None:
        """Before a layer runs: wait for its weights. Other passages have hooks on the same layer."""
        if threading.current_thread() is not self._thread:
            return
        expected = self._layers[self._reached] if self._reached < len(self._layers) else None
        if layer is not expected:
            raise FinetuneError("the model does not call its layers once, in order")
        self._back.release()
        self._turn.acquire()
        if not self._wanted:
            raise _Abandoned
        self._reached += 1
