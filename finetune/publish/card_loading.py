"""Code that loads a pushed model: each kind in the ways it can be used."""

from __future__ import annotations

from finetune.hub.client import HF_KINDS, Kind
from finetune.publish.facts import Facts

QUESTION = "What is a file descriptor?"
FOUR_BITS = (
    "four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type={type!r}, "
    "bnb_4bit_use_double_quant={double}, bnb_4bit_compute_dtype=torch.bfloat16)"
)

Block = tuple[str, str, str]  # a note, the language, the lines


def loading(kind: Kind, repo: str, facts: Facts) -> list[Block]:
    """Return the blocks of "How to load it"."""
    if kind == "gguf":
        return _gguf(repo, facts)
    if kind == "adapter":
        return [_adapter(repo, facts)]
    whole = f'model = AutoModelForCausalLM.from_pretrained({repo!r}, dtype="auto", device_map="auto")'
    if kind in HF_KINDS:
        extra = [] if kind == "nf4" else ["pip install compressed-tensors"]
        served = f"pip install vllm\nvllm serve {repo} --served-model-name {facts.recipe.name}"
        own = "\n".join(["pip install 'transformers[serving]'", *extra, f"transformers serve {repo}"])
        return [
            ("", "python", _python(repo, facts, [], [whole])),
            ("An OpenAI-compatible server on a GPU:", "sh", served),
            ("The same without vLLM:", "sh", own),
        ]
    small = [
        FOUR_BITS.format(type="nf4", double=True),
        f'model = AutoModelForCausalLM.from_pretrained({repo!r}, device_map="auto", quantization_config=four_bit)',
    ]
    return [
        ("", "python", _python(repo, facts, [], [whole])),
        ("In 4 bits, for a smaller GPU (this was not measured):", "python", "\n".join(_imports(["four"]) + small)),
    ]


def _imports(extra: list[str]) -> list[str]:
    names = "AutoModelForCausalLM, AutoTokenizer" + (", BitsAndBytesConfig" if "four" in extra else "")
    peft = ["from peft import PeftModel"] if "peft" in extra else []
    return ["import torch", f"from transformers import {names}", *peft]


def _adapter(repo: str, facts: Facts) -> Block:
    base, quantization = facts.base, facts.recipe.quantization
    on_hub, options, lines = base["kind"] == "hub", ['device_map="auto"'], list[str]()
    if quantization:
        lines.append(FOUR_BITS.format(type=quantization.type, double=quantization.double))
        options.append("quantization_config=four_bit")
    if on_hub and base.get("revision"):
        options.append(f"revision={base['revision']!r}")
    lines.append(f"model = AutoModelForCausalLM.from_pretrained({base['id']!r}, {', '.join(options)})")
    tokens = base.get("tokens")
    if tokens and tokens["rows"] > tokens["stored"]:
        lines.append(f"model.resize_token_embeddings({tokens['rows']}, mean_resizing=False)  # for the new tokens")
    lines.append(f"model = PeftModel.from_pretrained(model, {repo!r})")
    note = f"The base {base['id']} is not on the Hub: write its local folder here in place of its name."
    extra = ["peft", *(["four"] if quantization else [])]
    return "" if on_hub else note, "python", _python(repo, facts, extra, lines)


def _python(repo: str, facts: Facts, extra: list[str], model: list[str]) -> str:
    """Return Python code that loads the model and answers one question."""
    lines = [*_imports(extra), *model, f"tokenizer = AutoTokenizer.from_pretrained({repo!r})"]
    ends = ""
    if facts.template:
        lines.append(f'messages = [{{"role": "user", "content": "{QUESTION}"}}]')
        lines.append("inputs = tokenizer.apply_chat_template(")
        lines.append('    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"')
        lines.append(").to(model.device)")
        ends = f", eos_token_id={list(facts.template['terminators'])!r}"
    else:
        lines.append(f'inputs = tokenizer("{QUESTION}", return_tensors="pt").to(model.device)')
    lines.append(f"answer = model.generate(**inputs, max_new_tokens=256{ends})")
    lines.append('print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))')
    return "\n".join(lines)


def _gguf(repo: str, facts: Facts) -> list[Block]:
    first = (
        f"model-{facts.recipe.export.gguf[0]}.gguf"
        if facts.recipe.export and facts.recipe.export.gguf
        else "model.gguf"
    )
    llama = f"hf download {repo} {first} --local-dir .\nllama-cli -m {first} --jinja -p '{QUESTION}'"
    name = facts.recipe.name
    ollama = f"hf download {repo} {first} Modelfile --local-dir .\nollama create {name} -f Modelfile\nollama run {name}"
    return [
        ("llama.cpp, with the chat template in the file:", "sh", llama),
        ("Ollama, with the Modelfile next to it:", "sh", ollama),
    ]
