"""What a run builds, what it does not build twice, and what survives a kill: the real commands on a small model."""

import json
import shutil
import signal
import time
from typing import get_type_hints

import pytest
from safetensors.numpy import load_file

from finetune.metrics import RunMetrics

STAGES = (
    "base generate ingest filter embed dedup decontaminate sample split render pack pairs train align evaluate certify "
    "merge export".split()
)
OFF = {"generate", "decontaminate", "sample", "pairs", "align", "export"}


@pytest.fixture
def work(finished, tmp_path):
    """A finished workspace of one's own."""
    copy = tmp_path / "a name with späces"
    shutil.copytree(finished.folder, copy)
    moved = type(finished)(copy)
    moved.run("run", "small.yaml")  # the run's record names folders: let it be written anew
    return moved


@pytest.fixture
def clean_work(pristine, tmp_path):
    shutil.copytree(pristine.folder, tmp_path / "work")
    return type(pristine)(tmp_path / "work")


def rebuilt(before, after):
    return [name for name in STAGES if before[name] != after[name]]


def outputs(workspace):
    """The bytes that count: adapter and merged model."""
    stages = workspace.show()["stages"]
    from pathlib import Path

    adapter = Path(stages["train"]["path"]) / "adapter" / "adapter_model.safetensors"
    merged = Path(stages["merge"]["path"]) / "model.safetensors"
    return adapter.read_bytes(), merged.read_bytes()


def test_show_has_every_stage_and_the_promised_metrics(finished):
    shown = finished.show()
    assert shown["recipe"] == "small" and list(shown["stages"]) == STAGES
    for name, stage in shown["stages"].items():
        assert stage["status"] == ("off" if name in OFF else "done"), name
    promised = {
        "dedup": "rows_in rows_out exact embedding",
        "render": "supervised_fraction truncated dropped",
        "pack": "efficiency",
        "train": "loss tokens_per_second peak_memory_bytes",
        "evaluate": "perplexity_base perplexity_adapter nll_true nll_shuffled stop_rate",
        "certify": "base perplexity_trained perplexity_merged mean_kl agreement",
        "merge": "peak_anon_bytes seconds",
    }
    for stage, names in promised.items():
        assert set(names.split()) <= set(shown["stages"][stage]["metrics"]), stage
    assert shown["stages"]["dedup"]["metrics"]["exact"] >= 20
    assert shown["stages"]["train"]["metrics"]["loss"] < shown["stages"]["train"]["metrics"]["first_loss"]


def test_every_metric_has_a_place_in_its_stages_record(finished):
    records = get_type_hints(RunMetrics)
    stages = finished.show()["stages"]
    for name in STAGES:
        assert set(stages[name]["metrics"]) <= set(records[name].__annotations__), name


def test_a_second_run_builds_nothing_and_imports_no_torch(work):
    before = work.show()
    code = (
        "import sys; from finetune.cli.main import main\ntry: main()\n"
        "finally: print('heavy:', sorted({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    command = work.command("run", "small.yaml")
    command[1:3] = ["-c", code]
    import subprocess

    done = subprocess.run(command, env=work.environment(), cwd=work.folder, capture_output=True, text=True, check=True)
    assert "heavy: []" in done.stdout
    assert work.show() == before


def test_a_runtime_field_reruns_nothing(work):
    before = work.keys()
    work.run("run", "small.yaml", "--set", "runtime.save_steps=7", "--set", "tracking.wandb_project=x")
    assert rebuilt(before, work.keys()) == []


@pytest.mark.slow
def test_a_training_field_reruns_train_onward_and_the_old_model_comes_back_from_the_store(work):
    before = work.keys()
    work.run("run", "small.yaml", "--set", "train.learning_rate=1e-3", "--until", "train")
    assert rebuilt(before, work.keys())[:1] == ["train"]
    done = work.run("run", "small.yaml")
    assert "…" not in done.stderr  # nothing is said to be built
    assert work.keys() == before


def test_a_changed_threshold_reruns_dedup_and_stops_where_the_output_is_the_same(work):
    before = work.keys()
    work.run("run", "small.yaml", "--set", "dedup.threshold=0.985")
    assert rebuilt(before, work.keys()) == ["dedup"]
    work.run("run", "small.yaml", "--set", "dedup.threshold=0.6", "--until", "pack")
    assert {"dedup", "split", "render", "pack"} <= set(rebuilt(before, work.keys()))


@pytest.mark.slow
def test_an_edited_data_file_template_or_base_reruns_what_reads_it(work):
    before = work.keys()
    with (work.folder / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"instruction": "Something new?", "input": "", "output": "Indeed, a new thing."}) + "\n")
    work.run("run", "small.yaml", "--until", "dedup")
    assert rebuilt(before, work.keys())[:1] == ["ingest"]
    before = work.keys()
    config = json.loads((work.folder / "base" / "config.json").read_text())
    (work.folder / "base" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    work.run("run", "small.yaml", "--until", "dedup")
    assert rebuilt(before, work.keys())[:1] == ["base"]
    template = "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'] }}\n{% else %}" + (
        "A: {% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    (work.folder / "mine.jinja").write_text(template)
    work.run("run", "small.yaml", "--set", "render.template=mine.jinja", "--until", "render")
    before = work.keys()
    (work.folder / "mine.jinja").write_text(template.replace("Q:", "Question:"))
    work.run("run", "small.yaml", "--set", "render.template=mine.jinja", "--until", "render")
    assert rebuilt(before, work.keys())[:1] == ["render"]


def test_a_flipped_byte_is_named_and_not_built_upon(work):
    from pathlib import Path

    path = Path(work.show()["stages"]["dedup"]["path"]) / "rows.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert str(path) in work.run("show", "small", "--verify", status=1).stderr
    refused = work.run("run", "small.yaml", "--set", "split.eval_fraction=0.2", "--until", "split", status=1)
    assert "refuses to build on" in refused.stderr and str(path) in refused.stderr


@pytest.mark.slow
def test_a_deleted_scratch_folder_is_made_again(work):
    before = outputs(work)
    shutil.rmtree(work.folder / "scratch")
    assert work.show()["stages"]["merge"]["status"] == "missing"
    work.run("run", "small.yaml")
    assert outputs(work) == before


def wait_for(workspace, process, pattern, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if any(workspace.folder.glob(pattern)):
            return
        time.sleep(0.005)
    raise AssertionError(f"{pattern} never appeared: {process.communicate()[0] if process.poll() is not None else ''}")


KILLS = {"train": "artifacts/train/*/checkpoints/checkpoint-4/COMPLETE"}  # test_deaths.py kills every stage anywhere


@pytest.mark.slow
@pytest.mark.parametrize("stage", KILLS)
def test_kill_9_loses_nothing(stage, clean_work, finished):
    process = clean_work.start("run", "small.yaml")
    wait_for(clean_work, process, KILLS[stage])
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = clean_work.run("run", "small.yaml")
    if stage == "train":
        assert "goes on from checkpoint-4" in done.stderr
    assert outputs(clean_work) == outputs(finished)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_training_leaves_a_checkpoint_and_says_so(number, clean_work, finished):
    process = clean_work.start("run", "small.yaml", "--set", "runtime.save_steps=100")
    wait_for(clean_work, process, "artifacts/train/*/metrics.jsonl")
    while process.poll() is None and not any(
        p.read_text() for p in clean_work.folder.glob("artifacts/train/*/metrics.jsonl")
    ):
        time.sleep(0.005)
    process.send_signal(number)
    text = process.communicate()[0]
    assert process.returncode == 128 + number, text
    assert "Traceback" not in text
    assert any(clean_work.folder.glob("artifacts/train/*/checkpoints/*/COMPLETE"))
    assert clean_work.show()["stages"]["train"]["status"] == "partial"
    clean_work.run("run", "small.yaml")
    assert outputs(clean_work) == outputs(finished)


@pytest.mark.slow
def test_a_changed_recipe_does_not_silently_abandon_a_half_finished_training(clean_work):
    process = clean_work.start("run", "small.yaml", "--until", "train")
    wait_for(clean_work, process, KILLS["train"])
    process.send_signal(signal.SIGKILL)
    process.wait()
    change = ("--set", "train.learning_rate=1e-3", "--until", "train")
    refused = clean_work.run("run", "small.yaml", *change, status=3)
    assert "train.learning_rate was 0.005, is 0.001" in refused.stderr and "--fresh" in refused.stderr
    assert clean_work.show()["stages"]["train"]["status"] == "refused"
    process = clean_work.start("run", "small.yaml", *change, "--fresh", "--set", "runtime.save_steps=2")
    wait_for(clean_work, process, KILLS["train"].replace("checkpoint-4", "checkpoint-2"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    clean_work.run("run", "small.yaml", *change)  # --fresh is said once: what it began can be gone on with
    undone = clean_work.run("run", "small.yaml", "--until", "train")
    assert "goes on from checkpoint-4" in undone.stderr  # and what it left behind is still there


@pytest.mark.slow
def test_a_kill_after_the_last_step_adds_no_step(clean_work, finished):
    """The last checkpoint is the result: Trainer by itself would take one step more on resuming from it."""
    process = clean_work.start("run", "small.yaml")
    wait_for(clean_work, process, "artifacts/train/*/checkpoints/checkpoint-12/COMPLETE")
    process.send_signal(signal.SIGKILL)
    process.wait()
    clean_work.run("run", "small.yaml")
    assert clean_work.show()["stages"]["train"]["metrics"]["steps"] == 12
    assert outputs(clean_work) == outputs(finished)


@pytest.mark.slow
def test_two_runs_at_once_build_each_stage_once(clean_work):
    processes = [clean_work.start("run", "small.yaml", "--until", "pack") for _ in range(2)]
    texts = [p.communicate()[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], texts
    for stage in ("base", "ingest", "filter", "dedup", "render", "pack"):
        assert "\n".join(texts).splitlines().count(f"{stage} …") == 1, stage


def test_the_merged_model_answers_as_the_adapter_on_its_base_does(finished):
    from pathlib import Path

    stages = finished.show()["stages"]
    merged = load_file(str(Path(stages["merge"]["path"]) / "model.safetensors"))
    adapter = load_file(str(Path(stages["train"]["path"]) / "adapter" / "adapter_model.safetensors"))
    base = load_file(str(finished.folder / "base" / "model.safetensors"))
    if stages["certify"]["metrics"]["base"] != "original":
        pytest.skip("the certificate chose the dequantized base; test_lora_merge compares that one")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    assert abs(merged[f"{name}.weight"] - (base[f"{name}.weight"] + 2.0 * b @ a)).max() < 1e-5


def test_plan_inspect_and_clean_on_a_finished_run(work):
    plan = json.loads(work.run("plan", "small.yaml", "--json").stdout)
    assert plan["stages"]["merge"] == "done" and plan["steps"] == 12
    assert "supervised" in work.run("inspect", "small.yaml", "--rows", "2").stdout
    work.run("run", "small.yaml", "--set", "seed=1", "--until", "pack")
    listed = work.run("clean", "--keep", "1")
    assert "nothing deleted" in listed.stdout
    assert "bytes freed" in work.run("clean", "--keep", "1", "--yes").stdout
    assert work.show()["stages"]["pack"]["status"] == "done"


def test_a_mistake_is_one_sentence_with_its_own_exit_status(clean_work):
    assert "no stage named 'trian'" in clean_work.run("run", "small.yaml", "--until", "trian", status=2).stderr
    assert "No such option" in clean_work.run("run", "small.yaml", "--fersh", status=2).stderr
    missing = clean_work.run("run", "small.yaml", "--set", "data.0.path=nowhere.jsonl", status=2)
    assert "nowhere.jsonl" in missing.stderr and "Traceback" not in missing.stderr
    assert "has not run yet" in clean_work.run("show", "small", status=2).stderr
    assert not (clean_work.folder / "artifacts").exists() or not list(
        (clean_work.folder / "artifacts").glob("*/*/manifest.json")
    )


@pytest.mark.slow
def test_an_adapter_that_an_unknown_base_cannot_have_is_refused_right_after_the_base_stage(clean_work):
    config = clean_work.folder / "base" / "config.json"
    said = json.loads(config.read_text())
    del said["tie_word_embeddings"]  # left open, so that transformers has to be asked
    config.write_text(json.dumps(said))
    refused = clean_work.run("run", "small.yaml", "--set", "lora.targets=[kk_proj]", status=2)
    assert "lora.targets: no linear module named 'kk_proj'; did you mean k_proj?" in refused.stderr
    stages = {name: s["status"] for name, s in clean_work.show()["stages"].items()}
    assert (stages["base"], stages["ingest"]) == ("done", "missing")


def test_a_data_file_edited_while_it_is_read_is_not_built_from(clean_work):
    """The key names what the file held before: what was read may be neither the old nor the new."""
    from finetune.context import Context
    from finetune.errors import FinetuneError
    from finetune.pipeline import runner
    from finetune.pipeline.store import Store
    from finetune.recipe.load import load_recipe

    recipe = load_recipe(str(clean_work.recipe)).recipe
    store = Store(clean_work.folder / "artifacts", clean_work.folder / "scratch")

    def edit(line):
        if line == "ingest …":
            with (clean_work.folder / "rows.jsonl").open("a") as file:
                file.write('{"instruction": "q", "output": "a"}\n')

    ctx = Context(scratch=store.scratch, runtime=recipe.runtime, tracking=recipe.tracking, say=edit, device="cpu")
    step = next(s for s in runner.plan(recipe, store) if s.stage.name == "ingest")
    with pytest.raises(FinetuneError, match="changed meanwhile"):
        runner.build(step, recipe, store, ctx)
    assert store.find(step.folder) is None
