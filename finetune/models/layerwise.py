"""A causal model that holds one decoder layer at a time: the rows go through layer by layer, weights come and go.

A certificate of a 7B merge so needs the activations of the held-out rows and two layers, not 14.5 GB. The model is the
architecture's own class on the meta device; only where its weights come from is ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import InputError
from finetune.models.precision import autocast
from finetune.utils.prefetch import in_order
from finetune.utils.runtime import give_back

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

    from finetune.utils.safetensors_io import torch_dtype

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
    each `hidden`; a tensor comes in any dtype and is cast to that of its place.
    """

    def __init__(
        self, model: PreTrainedModel, weights: Weights, device: str = "cpu", autocast: torch.dtype | None = None
    ) -> None:
        """Take over `model` (from `empty_model`), to be run under `autocast`; nothing is loaded yet."""
        self.model = model
        self.layers = decoder_layers(model)
        self._head: nn.Module = model.get_output_embeddings()
        self._weights = weights
        self._device = device
        self._autocast = autocast
        for name, buffer in list(model.named_buffers()):
            owner, leaf = _owner(model, name)
            if not buffer.is_meta:  # what peft keeps of a base it may have to give back; no forward reads it
                owner._buffers[leaf] = buffer.to(device)

    def hidden(self, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Final hidden states (B, T, d) of each batch of right-padded rows (B, T) int64; each weight is loaded once."""
        return hidden_states([self], batches)[0]

    def begin(self, batches: Sequence[torch.Tensor]) -> None:
        """Run what comes before the layers, and note what the body hands to each of them (rotary tables, masks)."""
        import torch

        embedding = {id(p) for p in self.model.get_input_embeddings().parameters()}
        of_layers = {id(p) for layer in self.layers for p in layer.parameters()}
        of_head = {id(p) for p in self._head.parameters()} - embedding  # tied: needed before the layers
        outer = [(n, p) for n, p in self.model.named_parameters() if id(p) not in of_layers | of_head]
        first = [n for n, p in outer if id(p) in embedding]
        self._rest = [n for n, p in outer if id(p) not in embedding]
        with torch.no_grad(), self._precision():
            self._put(self._rest, self.load(self._rest))
            with self._loaded(first):
                self._calls = [self._record(b.to(self._device)) for b in batches]
        self._states = [call[0][0] for call in self._calls]

    def layer_names(self, index: int) -> list[str]:
        """The parameters of one layer."""
        inside = {id(p) for p in self.layers[index].parameters()}
        return [n for n, p in self.model.named_parameters() if id(p) in inside]

    def load(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Weights to be put in place later; may run in another thread than the rest."""
        return {name: self._weights(name) for name in names}

    def advance(self, index: int, loaded: dict[str, torch.Tensor]) -> None:
        """Take every batch through layer `index`, whose weights were `loaded` (emptied here)."""
        import torch

        names = list(loaded)
        self._put(names, loaded)
        with torch.no_grad(), self._precision():
            for place, call in enumerate(self._calls):
                self._states[place] = _first(self.layers[index](self._states[place], **call[index][1]))
        self._drop(names)
        give_back()

    def end(self) -> list[torch.Tensor]:
        """Run what follows the layers; the final hidden states (B, T, d) of each batch."""
        with self._precision():
            found = [self._finish(state) for state in self._states]
        self._drop(self._rest)
        del self._calls, self._states
        return found

    def _record(self, input_ids: torch.Tensor) -> list[tuple[torch.Tensor, dict[str, Any]]]:
        """What the body hands to each layer; no layer runs."""
        calls: list[tuple[torch.Tensor, dict[str, Any]]] = []

        def note(hidden_states: torch.Tensor, **others: Any) -> torch.Tensor:  # noqa: ANN401 - whatever the body hands
            calls.append((hidden_states, others))
            return hidden_states

        with _standing_in(self.layers, note):
            final_hidden(self.model, input_ids)
        return calls

    def _finish(self, state: torch.Tensor) -> torch.Tensor:
        with _standing_in(self.layers, lambda *_, **__: state):
            return final_hidden(self.model, inputs_embeds=state)

    @contextmanager
    def head(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """The function from hidden states (N, d) to logits (N, vocabulary), its weights loaded while it is open."""
        names = [n for n, p in self.model.named_parameters() if any(p is q for q in self._head.parameters())]
        with self._loaded(names):
            yield self._logits

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        with self._precision():
            return head_logits(self.model, hidden)

    def _precision(self) -> torch.autocast:
        return autocast(self._device, self._autocast)

    @contextmanager
    def _loaded(self, names: Sequence[str]) -> Iterator[None]:
        self._put(names, self.load(names))
        try:
            yield
        finally:
            self._drop(names)
            give_back()

    def _put(self, names: Sequence[str], values: dict[str, torch.Tensor]) -> None:
        """Put `values` in place, each in the dtype of the place; `values` is emptied, as two copies may be too much."""
        from torch import nn

        tied = _tied(self.model, names)
        for name in names:
            owner, leaf = _owner(self.model, name)
            dtype = owner._parameters[leaf].dtype  # type: ignore[union-attr]
            parameter = nn.Parameter(values.pop(name).to(device=self._device, dtype=dtype), requires_grad=False)
            self._share(tied[name], parameter)

    def _drop(self, names: Sequence[str]) -> None:
        from torch import nn

        tied = _tied(self.model, names)
        for name in names:
            owner, leaf = _owner(self.model, name)
            empty = nn.Parameter(owner._parameters[leaf].to("meta"), requires_grad=False)  # type: ignore[union-attr]
            self._share(tied[name], empty)

    def _share(self, places: Sequence[str], parameter: nn.Parameter) -> None:
        for place in places:
            owner, leaf = _owner(self.model, place)
            owner._parameters[leaf] = parameter


def hidden_states(
    models: Sequence[StreamedModel],
    batches: Sequence[torch.Tensor],
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> list[list[torch.Tensor]]:
    """For each of `models`, of the same depth, what `StreamedModel.hidden` returns.

    They go through layer by layer, side by side, so that what they read of one base is still in the page cache; a
    thread loads the weights of the next layer while one computes. `track` wraps the loop over layers.
    """
    for model in models:
        model.begin(batches)
    jobs = [(model, model.layer_names(i)) for i in range(len(models[0].layers)) for model in models]
    ready = in_order(lambda job: job[0].load(job[1]), jobs, threads=1, ahead=2)
    with closing(ready):
        for index in track(range(len(models[0].layers))):
            for model in models:
                model.advance(index, next(ready))
    return [model.end() for model in models]


def final_hidden(
    model: PreTrainedModel, input_ids: torch.Tensor | None = None, inputs_embeds: torch.Tensor | None = None
) -> torch.Tensor:
    """What the head is given, (B, T, d), for right-padded rows (B, T), or for what the embedding makes of them.

    Without a mask, as no position looks ahead.
    """
    import torch

    with torch.no_grad():
        hidden: torch.Tensor = model.base_model(
            input_ids=input_ids, inputs_embeds=inputs_embeds, use_cache=False
        ).last_hidden_state
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
        # The class's forward: one that TRL put on the model itself would go on to the model's own body.
        ids = torch.zeros(1, len(hidden), dtype=torch.int64)
        logits: torch.Tensor = type(model).forward(shell, input_ids=ids).logits[0]
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
