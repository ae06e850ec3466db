"""Small real tokenizers of the four kinds that bases use, trained on a few lines."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = (
    "What is the capital of France? The capital of France is Paris.",
    "[INST] Write a poem about the sea. [/INST] The sea is wide and blue, and so are you.",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:\nCount to three.\n\n### Response:\none two three\n\n\n four",
    "system user assistant <<SYS>> You are helpful. <</SYS>> def f(x):\n    return x + 1\n",
    "Grüße aus Köln, naïve café, 日本語 too; 0123456789 /s < > | im_end im_start eot_id",
) * 4
BYTE_SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|im_start|>", "<|im_end|>", "<|finetune_right_pad_id|>", "<|end|>", "<start_of_turn>", "<end_of_turn>",
)  # fmt: skip
# as Llama-3 and Qwen split: line ends belong together, whatever follows (GPT-2's own pattern looks ahead)
LINES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KINDS = ("sentencepiece", "metaspace", "unigram", "byte_level")


@cache
def _backend(kind: str) -> str:
    if kind == "byte_level":
        tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(LINES), "isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        tokenizer.train_from_iterator(CORPUS, trainer)
        tokenizer.add_special_tokens(list(BYTE_SPECIAL))
        tokenizer.add_tokens(["<tool_call>"])
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        return str(tokenizer.to_str())
    special = ["<unk>", "<s>", "</s>"]
    alphabet = [f"<0x{i:02X}>" for i in range(256)]
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=400, special_tokens=[*special, "<pad>"], unk_token="<unk>", show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*special, *alphabet], show_progress=False)
    # trained word by word, as SentencePiece is, so that a space only ever begins a token
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.train_from_iterator(CORPUS, trainer)
    if kind == "sentencepiece":  # as Llama-2's converted file: every piece between control tokens gets a space in front
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = None
    elif kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    content = json.loads(tokenizer.to_str())
    # the trainer made the byte pieces special; in real tokenizers they are ordinary vocabulary
    content["added_tokens"] = [t for t in content["added_tokens"] if not t["content"].startswith("<0x")]
    return json.dumps(content)


def build(kind: str, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A fresh tokenizer of one of KINDS."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if kind == "byte_level":
        names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    if kind == "unigram":
        names["pad_token"] = "<pad>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_backend(kind)), **names)
    tokenizer.chat_template = chat_template
    return tokenizer
