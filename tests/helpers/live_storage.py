"""The bytes that live at once while torch computes: what is held to the plan's prediction of them, on any device.

Saved-tensor hooks see neither what is recomputed nor a selective cache; this counts storages, from the operator that
makes one to its end.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """Within it, `live` and `peak` are bytes of the storages that operators made and that are not gone.

    Each storage counts once, however many views it has; what lived before is not counted, and a kernel's own scratch
    is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._before: set[int] = set()
        self._sizes: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operator, and count what it made: a storage that none of its arguments has."""
        given = {self._key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and self._key(leaf) not in given:
                self._add(leaf.untyped_storage())
        return result

    @staticmethod
    def _key(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._sizes or not size:
            return
        self._sizes[key] = (weakref.ref(storage, lambda _: self._drop(key)), size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _drop(self, key: int) -> None:
        _, size = self._sizes.pop(key)
        self.live -= size
