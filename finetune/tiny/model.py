"""`builtin:tiny-mistral`: a small Mistral, pre-trained locally in under a minute, for trials without network.

It has what a 7B Mistral has (grouped-query attention, RoPE, SwiGLU, untied embeddings, a BPE tokenizer, a chat
template) and has seen no chats: it is trained on reference entries only (`tiny/text.py`), so fine-tuning has an effect.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.context import Context
from finetune.errors import FinetuneError
from finetune.metrics import BaseMetrics
from finetune.models.device import has_bf16
from finetune.tiny.muon import Muon, gradient_of
from finetune.tiny.text import Shingles, corpus
from finetune.utils.quiet import quiet
from finetune.utils.runtime import single_thread

if TYPE_CHECKING:
    import torch
    from transformers import MistralForCausalLM, PreTrainedTokenizerFast

BOS, EOS, UNK, PAD = "<s>", "</s>", "<unk>", "<pad>"
BOS_ID, EOS_ID, PAD_ID = 1, 2, 3  # the first three ids are Mistral's; no text contains the pad token
WORKERS = 2  # fixed, because it decides the order of sums: one seed gives the same bits on 1 core and on 64
# Attention scale and output scale of the wired heads; measured, and changed by training.
POSITION, CONTENT, WRITING = 6.5, 1.7, 0.3
HELD_OUT = 40  # every 40th entry is held out for measuring the loss
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 is even) -%}
        {{- raise_exception('user and assistant turns must alternate, beginning with the user') -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- '[INST] ' + message['content'] + ' [/INST]' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- ' ' + message['content'] + eos_token -}}
    {%- else -%}
        {{- raise_exception('this template does not support the role ' + message['role']) -}}
    {%- endif -%}
{%- endfor -%}
"""


@dataclass(frozen=True)
class Size:
    """Size of the model and of its pre-training.

    `hidden` and `intermediate` are multiples of 64, the block of NF4; `wire_lookup` needs four heads and two layers.
    """

    hidden: int = 128
    intermediate: int = 384
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    vocabulary: int = 2048
    theta: float = 1_000_000.0  # RoPE base, that of Mistral-7B-Instruct-v0.2
    sequence: int = 256  # tokens
    batch: int = 8  # sequences a step
    steps: int = 290
    learning_rate: float = 12e-3
    embedding_rate: float = 3.0  # times learning_rate
    warmup: float = 0.05  # share of the steps
    text: float = 0.8  # share of the text that is used


TINY = Size()


@dataclass(frozen=True)
class Tokens:
    """The text as token ids, (rows, sequence) int64 each, and tokens per byte of the held-out text."""

    train: torch.Tensor
    held_out: torch.Tensor
    tokens_per_byte: float


def build(out: Path, seed: int, known: Iterable[str], ctx: Context, size: Size = TINY) -> BaseMetrics:
    """Train tokenizer and model, and write a complete bf16 model folder to `out`.

    `known` are texts that must not be learnt: no run of eight of their words is in the training text. Always runs on
    the CPU and sums in a fixed order, so that one kind of machine gives the same bytes for the same seed.
    Raises FinetuneError if training diverges.
    """
    started = time.monotonic()
    ctx.say("base: reading documentation to pre-train on")
    documents = corpus(Shingles(known), size.text)
    tokenizer = train_tokenizer([d for i, d in enumerate(documents) if i % HELD_OUT], size.vocabulary)
    tokens = encode(tokenizer, documents, size.sequence, seed)
    # The operations are so small that torch's threads mostly wait for each other: more than WORKERS gain nothing.
    with single_thread():
        model = new_model(size, seed)
        loss = pretrain(model, tokens.train, size, seed, ctx)
        held_out = mean_loss(model, tokens.held_out)
    model.bfloat16()
    with quiet():
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {
        "pretraining_steps": size.steps,
        "pretraining_tokens": size.steps * size.batch * size.sequence,
        "pretraining_loss": loss,
        "held_out_loss": held_out,
        "held_out_bits_per_byte": held_out * tokens.tokens_per_byte / math.log(2),
        "pretraining_seconds": time.monotonic() - started,
    }


def train_tokenizer(documents: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that splits words from punctuation, so that a name has the same tokens everywhere."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    pattern = Regex(r" ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[UNK, BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def layout(size: Size = TINY) -> dict[str, object]:
    """Return the part of the future config.json that describes the modules."""
    fixed = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "tie_word_embeddings": False}
    return {**fixed, "num_hidden_layers": size.layers}


def new_model(size: Size, seed: int) -> MistralForCausalLM:
    """Return an untrained fp32 model, wired for lookup; the global random state is unchanged."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=2048,
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        rope_parameters={"rope_type": "default", "rope_theta": size.theta},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MistralForCausalLM(config)
        wire_lookup(model, size.theta)
    return model


def wire_lookup(model: MistralForCausalLM, theta: float) -> None:
    """Initialise one induction head (arXiv:2209.11895), which is then trained like every other weight.

    A model learns to continue `A B ... A` with `B` by itself, but from far more tokens than the half million here.
    The residual stream begins as [code of the token | of the token before | of the token to write | 1]. A head of
    layer 0 attends to the previous position and copies its code; a head of layer 1 attends to positions whose previous
    token is the current token, and writes the token there in the form that `lm_head` reads.
    """
    import torch

    hidden, width = model.config.hidden_size, model.config.hidden_size // model.config.num_attention_heads
    codes, one, half = hidden // 2, hidden - 1, width // 2
    here, before, written = slice(0, codes), slice(codes, codes + width), slice(codes + width, codes + 2 * width - 1)
    # RoPE rotates dimension i together with i + half, by this many radians per token
    turns = theta ** (-torch.arange(0, width, 2) / width)
    fast = (turns > 0.01).nonzero().flatten()  # distinguishes a position from the next
    slow = (turns <= 0.01).nonzero().flatten()  # hardly rotates within a text: can compare content
    content = torch.cat([slow, slow + half])
    chosen = torch.zeros(width, width).index_put_((content, content), torch.tensor(CONTENT))
    previous, lookup = (layer.self_attn for layer in model.model.layers[:2])
    code = torch.nn.functional.normalize(torch.randn(model.config.vocab_size, codes), dim=1) * codes**0.5
    to_before, to_written = _projection(width, codes), _projection(width - 1, codes)
    sharp = POSITION / codes**0.5
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight.mul_(0.1)
        embedding[:, here] = code
        embedding[:, one] = codes**0.5  # so that RMSNorm keeps elements of a code near 1
        previous.q_proj.weight[fast, one] = sharp * torch.cos(turns[fast])  # a query rotated back by one position
        previous.q_proj.weight[fast + half, one] = -sharp * torch.sin(turns[fast])
        previous.k_proj.weight[fast, one] = sharp
        previous.v_proj.weight[:width, here] = to_before
        previous.o_proj.weight[before, :width] = torch.eye(width)
        lookup.q_proj.weight[:width, here] = chosen @ to_before
        lookup.k_proj.weight[:width, before] = chosen
        lookup.v_proj.weight[: width - 1, here] = to_written
        lookup.o_proj.weight[written, : width - 1] = torch.eye(width - 1)
        model.lm_head.weight[:, written] = WRITING * code @ to_written.T


def _projection(rows: int, columns: int) -> torch.Tensor:
    """Return random orthogonal rows, (rows, columns), that keep a code's elements near 1."""
    import torch

    return torch.linalg.qr(torch.randn(columns, rows))[0].T * (columns / rows) ** 0.5


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], sequence: int, seed: int) -> Tokens:
    """Concatenate shuffled documents as `<s> text </s>` and cut every `sequence` tokens; the remainder is dropped."""
    import torch

    encoded = [e.ids for e in tokenizer.backend_tokenizer.encode_batch(list(documents), add_special_tokens=True)]
    order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(seed)).tolist()
    rows: list[torch.Tensor] = []
    for chosen in ([i for i in order if i % HELD_OUT], [i for i in order if not i % HELD_OUT]):
        ids = torch.tensor([t for i in chosen for t in (*encoded[i], EOS_ID)])
        rows.append(ids[: len(ids) // sequence * sequence].view(-1, sequence))
    held_out = range(0, len(documents), HELD_OUT)
    size = sum(len(documents[i].encode()) for i in held_out)
    return Tokens(rows[0], rows[1], sum(len(encoded[i]) for i in held_out) / size)


def pretrain(model: MistralForCausalLM, rows: torch.Tensor, size: Size, seed: int, ctx: Context) -> float:
    """Train `model` in place on `rows` (N, sequence) for `size.steps` steps; return the mean loss of the last tenth.

    The learning rate rises over `size.warmup` of the steps and falls linearly to zero.
    """
    import torch

    native = has_bf16()
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    embedding = model.model.embed_tokens.weight
    hidden = {id(p) for p in (*matrices, embedding)}
    groups = [{"params": [embedding]}, {"params": [p for p in model.parameters() if id(p) not in hidden]}]
    muon = Muon(matrices, torch.bfloat16 if native else torch.float32)
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(_epochs(len(rows), size))])
    bar = ctx.bar("pre-training tiny-mistral", size.steps)
    losses: list[float] = []
    model.train()
    model.set_attn_implementation("eager")  # a tenth faster than SDPA at this size
    with ThreadPoolExecutor(WORKERS) as pool:
        replicas = [model, *(_replica(model) for _ in range(WORKERS - 1))]
        try:
            for step, batch in enumerate(order[: size.steps * size.batch].split(size.batch)):
                ctx.stop.check()
                rate = size.learning_rate * min(1.0, (step + 1) / (size.warmup * size.steps)) * (1 - step / size.steps)
                parts = rows[batch].chunk(WORKERS)
                done = pool.map(partial(_backward, share=1 / len(parts), bf16=native), replicas, parts)
                losses.append(sum(done) / len(parts))
                _gather_gradients(replicas)
                adam.param_groups[0]["lr"] = rate * size.embedding_rate
                adam.param_groups[1]["lr"] = rate
                adam.step()
                muon.step(rate)
                bar.advance(note=f"loss {losses[-1]:.3f}")
        finally:
            bar.close()
    model.zero_grad()
    if not math.isfinite(sum(losses)):
        raise FinetuneError("pre-training of builtin:tiny-mistral diverged on this machine; take another seed")
    last = losses[-max(1, size.steps // 10) :]
    return sum(last) / len(last)


def _replica(model: MistralForCausalLM) -> MistralForCausalLM:
    """Return a model that shares the weights but has separate gradients."""
    twin = copy.deepcopy(model)
    for own, shared in zip(twin.parameters(), model.parameters(), strict=True):
        own.data = shared.data
    return twin


def _backward(model: MistralForCausalLM, ids: torch.Tensor, share: float, bf16: bool) -> float:
    """Compute gradients of `share` times the mean loss on `ids` (B, T) in `model`; return the mean loss."""
    import torch

    model.zero_grad()
    # weights in fp32; products in bf16 if the CPU has instructions for it (1.5 times faster, otherwise far slower)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(input_ids=ids, use_cache=False).logits  # (B, T, vocabulary)
    loss = _cross_entropy(logits, ids)
    torch.autograd.backward(loss * share)
    return loss.item()


def _gather_gradients(replicas: Sequence[MistralForCausalLM]) -> None:
    """Add the gradients of all replicas, in order, to those of the first, and clip their norm to 1."""
    import torch

    for parameters in zip(*(r.parameters() for r in replicas), strict=True):
        for other in parameters[1:]:
            gradient_of(parameters[0]).add_(gradient_of(other))
    torch.nn.utils.clip_grad_norm_(replicas[0].parameters(), 1.0)


def _epochs(rows: int, size: Size) -> int:
    if not rows:
        raise FinetuneError(
            "the documentation of the installed packages is too short to pre-train on; install them again"
        )
    return math.ceil(size.steps * size.batch / rows)


def _cross_entropy(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean negative log-likelihood of the tokens after the first; (B, T, V) and (B, T)."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def mean_loss(model: MistralForCausalLM, rows: torch.Tensor) -> float:
    """Return the mean loss per token on `rows` (N, sequence), in fp32; NaN without rows."""
    import torch

    model.eval()
    total = 0.0
    with torch.no_grad():
        for batch in rows.split(16):
            total += _cross_entropy(model(input_ids=batch, use_cache=False).logits, batch).item() * len(batch)
    return total / len(rows) if len(rows) else math.nan
