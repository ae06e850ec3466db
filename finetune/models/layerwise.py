"""A causal model that holds one decoder layer at a time: the rows go through layer by layer, weights come and go.

A certificate of a 7B merge so needs the activations of the held-out rows and two layers, not 14.5 GB. The model is the
architecture's own class on the meta device; only the source of its weights is ours. The body's own forward runs, in a
thread for each batch (models/paused.py) that waits at every layer until the layer's weights are in place and it has
run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from finetune.errors import InputError
from finetune.models.device import autocast
from finetune.models.paused import Passage, Relay
from finetune.utils.format import first_line
from finetune.utils.runtime import give_back, in_order

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

    CausalModel = PreTrainedModel | PeftModel

    class Generator(Protocol):
        """A causal model's `generate`, which neither of the two classes declares."""

        def generate(self, **arguments: object) -> torch.Tensor:
            """Return token ids (B, T), prompts first."""


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
    `untie` gives the head a weight of its own whatever the configuration has.
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
        raise InputError(
            f"{base}/config.json: transformers has no causal language model for it ({first_line(error)})"
        ) from error
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
        self._passages: list[Passage] = []
        self._relay: Relay | None = None
        self._other_parts = other_parts(model)
        for name, buffer in list(model.named_buffers()):
            owner, leaf = _owner(model, name)
            if not buffer.is_meta:  # what peft keeps of a base it may have to give back; no forward reads it
                owner._buffers[leaf] = buffer.to(device)

    def hidden(self, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Final hidden states (B, T, d) of each batch of right-padded rows (B, T) int64; each weight is loaded once."""
        return hidden_states([self], batches)[0]

    def begin(self, batches: Sequence[torch.Tensor]) -> None:
        """Run what comes before the layers, for each batch (B, T) int64."""
        embedding = {id(p) for p in self.model.get_input_embeddings().parameters()}
        of_layers = {id(p) for layer in self.layers for p in layer.parameters()}
        of_head = {id(p) for p in self._head.parameters()} - embedding  # tied: needed before the layers
        outer = [(n, p) for n, p in self.model.named_parameters() if id(p) not in of_layers | of_head]
        first = [n for n, p in outer if id(p) in embedding]
        self._rest = [n for n, p in outer if id(p) not in embedding and self._is_read(n)]
        self._put(self._rest, self.load(self._rest))
        self._fill_buffers()
        self._relay = Relay(self.layers)
        self._passages = [Passage(self.layers, partial(self._run, b.to(self._device))) for b in batches]
        try:
            with self._loaded(first):
                for passage in self._passages:
                    passage.proceed(0)
        except BaseException:
            self.close()
            raise

    def _fill_buffers(self) -> None:
        """Load the buffers that a checkpoint holds: a router's correction, a layer's scale."""
        saved = set(self.model.state_dict()) - {n for n, _ in self.model.named_parameters(remove_duplicate=False)}
        for name in sorted(saved):
            owner, leaf = _owner(self.model, name)
            buffer = owner._buffers.get(leaf)
            if buffer is not None and not buffer.is_meta and not name.startswith(self._other_parts):
                buffer.copy_(self._weights(name))

    def _run(self, input_ids: torch.Tensor) -> torch.Tensor:
        with self._precision():
            return final_hidden(self.model, input_ids)

    def _is_read(self, name: str) -> bool:
        """Whether text alone needs the parameter: not those of a vision tower."""
        return not name.startswith(self._other_parts)

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
            for passage in self._passages:
                passage.proceed(index + 1)
        self._drop(names)
        give_back()

    def end(self) -> list[torch.Tensor]:
        """The final hidden states (B, T, d) of each batch, once all layers have run."""
        results = [passage.result() for passage in self._passages]
        self.close()
        self._drop(self._rest)
        return results

    def close(self) -> None:
        """End what still runs, after an error."""
        for passage in self._passages:
            passage.abandon()
        self._passages = []
        if self._relay is not None:
            self._relay.remove()
            self._relay = None

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
    try:
        with closing(ready):
            for index in track(range(len(models[0].layers))):
                for model in models:
                    model.advance(index, next(ready))
        return [model.end() for model in models]
    finally:
        for model in models:
            model.close()


def final_hidden(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Return the input of the head, (B, T, d), for right-padded rows (B, T). Without a mask, as no position looks
    ahead.
    """
    import torch

    with torch.no_grad():
        hidden: torch.Tensor = body_of(model)(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden


def head_logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits (N, vocabulary) of final hidden states (N, d), soft-capped or scaled as the architecture does it.

    The model's own forward runs on a body whose forward returns `hidden`, because what follows the head (Gemma's soft
    cap, Cohere's scale) is only in that forward.
    """
    import torch

    given = _BodyOutput(last_hidden_state=hidden.unsqueeze(0))
    bodies = _bodies(model)
    kept = [vars(body).get("forward") for body in bodies]
    for body in bodies:
        body.forward = lambda *_, **__: given
    try:
        with torch.no_grad():
            # The class's forward: one that TRL put on the model itself would go on to the model's own body.
            ids = torch.zeros(1, len(hidden), dtype=torch.int64)
            logits: torch.Tensor = type(model).forward(model, input_ids=ids, use_cache=False).logits[0]
    finally:
        for body, forward in zip(bodies, kept, strict=True):
            if forward is None:
                del body.forward
            else:
                body.forward = forward
    return logits


def without_adapter(model: CausalModel) -> PreTrainedModel:
    """Return the causal model itself: the one inside peft's wrapper, with its adapted layers."""
    from peft import PeftModel

    return cast("PreTrainedModel", model.get_base_model()) if isinstance(model, PeftModel) else model


def body_of(model: PreTrainedModel) -> nn.Module:
    """The model without its head: the part that holds the input embedding."""
    body: nn.Module = model.base_model
    if body is not model:
        return body
    embedding = model.get_input_embeddings()  # Llama-4's text model names a part that it does not have
    return next((m for m in model.children() if any(e is embedding for e in m.modules()) and m is not embedding), body)


def text_body(model: PreTrainedModel) -> nn.Module:
    """The part of the body that reads text: the body itself, unless the model reads images or sound too."""
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else None
    return body_of(model) if decoder is None or decoder is model else decoder


def other_parts(model: PreTrainedModel) -> tuple[str, ...]:
    """Prefixes of the names of the body's parameters that text does not pass through: a vision tower, say."""
    names = {id(m): n for n, m in model.named_modules()}
    body, text = body_of(model), text_body(model)
    if text is body or id(text) not in names:
        return ()
    inside = f"{names[id(body)]}." if names[id(body)] else ""
    children = [
        f"{inside}{name}." for name, child in body.named_children() if next(child.parameters(), None) is not None
    ]
    return tuple(name for name in children if not f"{names[id(text)]}.".startswith(name))


def _bodies(model: PreTrainedModel) -> list[nn.Module]:
    """The modules whose answer the head may be given: a model calls its body, or (OPT) the decoder inside."""
    bodies = [body_of(model), text_body(model)]
    return [m for i, m in enumerate(bodies) if m is not model and all(m is not n for n in bodies[:i])]


class _BodyOutput(dict[str, "torch.Tensor"]):
    """The answer of a body that has already run: `last_hidden_state`; every other part is None."""

    def __getattr__(self, name: str) -> torch.Tensor | None:
        return self.get(name)

    def __getitem__(self, key: str | int) -> torch.Tensor:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The model's decoder layers, in order: the longest list of modules in its text body that is in no other list.

    Raises InputError when the body holds no such list.
    """
    from torch import nn

    lists: list[list[nn.Module]] = []
    inner: set[int] = set()
    for module in text_body(model).modules():  # outer modules come first
        if isinstance(module, nn.ModuleList) and id(module) not in inner:
            lists.append(list(module))
            inner |= {id(m) for m in module.modules()}
    if not any(lists):
        raise InputError(f"{type(model).__name__} has no list of decoder layers; it cannot be certified layer by layer")
    return max(lists, key=len)


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
