"""Private names of other libraries are used in one module, and each is still needed and still there."""

import ast
import inspect
from pathlib import Path

import pytest

from finetune.utils import upstream

ROOT = Path(__file__).parent.parent.parent / "finetune"
LIBRARIES = {
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "datasets",
    "accelerate",
    "huggingface_hub",
    "jinja2",
}
OURS_BY_CONTRACT = {
    "_exit",  # os
    "_model_call", "_model_generate",  # lm-eval: what its documentation tells a model class to define
    "_compute_kl_logps",  # trl's KTOTrainer: overridden in preference/trainers.py; tests/preference proves the result
    "_parameters", "_buffers",  # torch.nn.Module: named in its documentation of state
}  # fmt: skip


def test_no_other_module_uses_a_private_name():
    used = []
    for path in sorted(ROOT.rglob("*.py")):
        if path == ROOT / "utils" / "upstream.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in LIBRARIES:
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Attribute) and not (
                isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            ):
                names = [node.attr]
            else:
                continue
            used += [
                f"{path.name}:{node.lineno} {n}"
                for n in names
                if n.startswith("_") and n[1] != "_" and n not in OURS_BY_CONTRACT
            ]
    assert used == []


def test_transformers_compiles_templates_only_by_a_private_name():
    from transformers.utils import chat_template_utils

    assert upstream.compile_template("{{ messages[0] }}").render(messages=["a"]) == "a"
    public = [
        n for n, v in vars(chat_template_utils).items() if inspect.isfunction(v) and "compile" in n and n[0] != "_"
    ]
    assert public == []


def test_trainer_takes_every_gpu_it_sees_unless_it_is_told(tmp_path):
    from transformers import TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    assert arguments.n_gpu == 0
    arguments._n_gpu = 4  # as on a machine with four
    assert upstream.use_one_gpu(arguments).n_gpu == 1
    assert not isinstance(TrainingArguments.n_gpu, property) or TrainingArguments.n_gpu.fset is None, (
        "n_gpu can be set now"
    )


def test_peft_has_its_interface_for_own_layers_and_its_refusal_of_fused_kernels():
    import torch
    from peft import LoraConfig

    config = LoraConfig(target_modules=["x"])
    upstream.register_lora_layers(config, {torch.nn.Linear: torch.nn.Linear})
    assert not hasattr(config, "register_custom_module"), "use the public one"
    upstream.check_lora_target(config, torch.nn.Linear(1, 1), "x")


def test_a_model_names_what_it_keeps_in_fp32():
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(small)
    assert upstream.kept_in_fp32(model) == []
    model._keep_in_fp32_modules = ["lm_head"]
    assert upstream.kept_in_fp32(model) == ["lm_head"]


def test_transformers_draws_a_bar_over_gguf_whatever_it_is_told():
    from transformers import modeling_gguf_pytorch_utils as reader

    source = inspect.getsource(reader.load_gguf_checkpoint)
    assert "tqdm(reader.tensors" in source, "the bar is gone or can be switched off: no_gguf_bar can go"
    with upstream.no_gguf_bar():
        assert list(reader.tqdm([1])) == [1]
    assert inspect.isclass(reader.tqdm)


def test_ray_prints_what_a_lost_worker_wrote_by_one_private_function(monkeypatch):
    pytest.importorskip("ray")
    from ray._private import worker

    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)  # put back afterwards
    assert "print_to_stdstream" in inspect.getsource(worker).split("def print_to_stdstream", 1)[1], (
        "nothing calls it now"
    )
    upstream.silence_ray()
    assert worker.print_to_stdstream("line", ignore_prefix=True) is None
