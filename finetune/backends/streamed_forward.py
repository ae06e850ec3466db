"""A causal model that holds one decoder layer at a time: the rows go through layer by layer, weights come and go.

A certificate of a 7B merge so needs the activations of the held-out rows and one layer, not 14.5 GB. The model is the
architecture's own class on the meta device; only where its weights come from is ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

Weights = Callable[[str], "torch.Tensor"]


def empty_model(
    base: Path,
    dtype: str = "float32",
    attention: str | None = None,
    *,
    trust_remote_code: bool = False,
    untie: bool = False,
) -> PreTrainedModel:
    """The causal model that `base`/config.json describes: parameters on the meta device, buffers real, eval mode.

    `attention` is transformers' name of an implementation; None leaves the choice to the class (Gemma 2 has no SDPA).
    `untie` gives the head a weight of its own whatever the configuration says.
    Raises InputError when transformers knows no causal language model for the configuration.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    from finetune.backends.checkpoints import torch_dtype

    config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code, local_files_only=True)
    if untie:
        config.tie_word_embeddings = False
    try:
        with init_empty_weights(include_buffers=False):
            # typed Any: transformers' auto classes carry no annotations
            model: Any = AutoModelForCausalLM.from_config(
                config,
                dtype=torch_dtype(dtype),
                attn_implementation=attention,
                trust_remote_code=trust_remote_code,
            )
    except ValueError as error:
        first = str(error).splitlines()[0]
        raise InputError(f"{base}/config.json: transformers has no causal language model for it ({first})") from error
    model.tie_weights()  # building on the meta device gives each place a parameter of its own
    ready: PreTrainedModel = model.eval()
    return ready


class StreamedModel:
    """Final hidden states and logits of a model whose weights `weights(name)` gives, one decoder layer at a time.

    `weights` is called with the names of the model's parameters ("model.layers.0.self_attn.q_proj.weight"), once for
    each `hidden`; a tensor comes in any dtype and is cast to the model's own.
    """

    def __init__(self, model: PreTrainedModel, weights: Weights, device: str = "cpu") -> None:
        """Take over `model` (from `empty_model`); nothing is loaded yet."""
        self.model = model
        self.layers = decoder_layers(model)
        self._head: nn.Module = model.get_output_embeddings()
        self._weights = weights
        self._device = device
        for name, buffer in list(model.named_buffers()):
            owner, leaf = _owner(model, name)
            owner._buffers[leaf] = buffer.to(device)

    def hidden(
        self, batches: Sequence[torch.Tensor], track: Callable[[Sequence[nn.Module]], Iterable[nn.Module]] = iter
    ) -> list[torch.Tensor]:
        """Final hidden states (B, T, d) of each batch of right-padded rows (B, T) int64; every weight is loaded once.

        The body's forward runs twice around the layers: once to see what it hands to each of them (embeddings,
        rotary tables, masks), once to do what follows them (the last norm). `track` wraps the loop over layers.
        """
        import torch

        names = dict(self.model.named_parameters())
        of_layers = {id(p) for layer in self.layers for p in layer.parameters()}
        of_head = {id(p) for p in self._head.parameters()}
        of_head -= {id(p) for p in self.model.get_input_embeddings().parameters()}  # tied: needed before the layers
        outer = [n for n, p in names.items() if id(p) not in of_layers | of_head]
        by_id = {id(p): n for n, p in names.items()}
        ids = [b.to(self._device) for b in batches]
        with torch.no_grad(), self._loaded(outer):
            calls = [self._record(b) for b in ids]
            states = [call[0][0] for call in calls]
            for index, layer in enumerate(track(self.layers)):
                with self._loaded([by_id[id(p)] for p in layer.parameters()]):
                    states = [_first(layer(s, **c[index][1])) for s, c in zip(states, calls, strict=True)]
            return [self._finish(b, s) for b, s in zip(ids, states, strict=True)]

    def _record(self, input_ids: torch.Tensor) -> list[tuple[torch.Tensor, dict[str, Any]]]:
        """What the body hands to each layer; no layer runs."""
        calls: list[tuple[torch.Tensor, dict[str, Any]]] = []

        def note(hidden_states: torch.Tensor, **others: Any) -> torch.Tensor:  # noqa: ANN401 - whatever the body hands
            calls.append((hidden_states, others))
            return hidden_states

        with _standing_in(self.layers, note):
            final_hidden(self.model, input_ids)
        return calls

    def _finish(self, input_ids: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        with _standing_in(self.layers, lambda *_, **__: state):
            return final_hidden(self.model, input_ids)

    @contextmanager
    def head(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """The function from hidden states (N, d) to logits (N, vocabulary), its weights loaded while it is open."""
        names = [n for n, p in self.model.named_parameters() if any(p is q for q in self._head.parameters())]
        with self._loaded(names):
            yield lambda hidden: head_logits(self.model, hidden)

    @contextmanager
    def _loaded(self, names: Sequence[str]) -> Iterator[None]:
        tied = _tied(self.model, names)
        for name in names:
            self._put(name, tied[name])
        try:
            yield
        finally:
            for name in names:
                self._drop(name, tied[name])

    def _put(self, name: str, places: Sequence[str]) -> None:
        from torch import nn

        value = self._weights(name).to(device=self._device, dtype=self.model.dtype)
        parameter = nn.Parameter(value, requires_grad=False)
        for place in places:
            owner, leaf = _owner(self.model, place)
            owner._parameters[leaf] = parameter

    def _drop(self, name: str, places: Sequence[str]) -> None:
        from torch import nn

        owner, leaf = _owner(self.model, name)
        empty = nn.Parameter(owner._parameters[leaf].to("meta"), requires_grad=False)  # type: ignore[union-attr]
        for place in places:
            owner, leaf = _owner(self.model, place)
            owner._parameters[leaf] = empty


def final_hidden(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """What the head is given, (B, T, d), for right-padded rows (B, T): without a mask, as no position looks ahead."""
    import torch

    with torch.no_grad():
        hidden: torch.Tensor = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden


def head_logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits (N, vocabulary) of final hidden states (N, d), soft-capped or scaled as the architecture does it.

    The model's own forward runs over a body that returns `hidden`, because what follows the head (Gemma's soft cap,
    Cohere's scale) stands in that forward and nowhere else.
    """
    import torch

    shell = copy.copy(model)
    shell._modules = {**model._modules, model.base_model_prefix: _given(hidden.unsqueeze(0))}
    with torch.no_grad():
        logits: torch.Tensor = shell(input_ids=torch.zeros(1, len(hidden), dtype=torch.int64)).logits[0]
    return logits


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The model's decoder layers, in order: the longest list of modules in its body.

    Raises InputError when the body holds no such list.
    """
    from torch import nn

    lists = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise InputError(f"{type(model).__name__} has no list of decoder layers; it cannot be certified layer by layer")
    return max((list(found) for found in lists), key=len)


def _given(hidden: torch.Tensor) -> nn.Module:
    from torch import nn
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Given(nn.Module):
        """A body that has already run."""

        def forward(self, *_: object, **__: object) -> BaseModelOutputWithPast:
            return BaseModelOutputWithPast(last_hidden_state=hidden)

    return Given()


@contextmanager
def _standing_in(layers: Sequence[nn.Module], function: Callable[..., torch.Tensor]) -> Iterator[None]:
    """`function` answers in place of each layer; the layers keep the attributes that the body reads off them."""
    for layer in layers:
        layer.forward = function
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _first(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The hidden states, whether the layer returns them alone or before others."""
    return output[0] if isinstance(output, tuple) else output


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _tied(model: nn.Module, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """For each name, every place of the model that holds the same parameter."""
    places: dict[int, list[str]] = {}
    by_name = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in by_name.items():
        places.setdefault(id(parameter), []).append(name)
    return {name: tuple(places[id(by_name[name])]) for name in names}
