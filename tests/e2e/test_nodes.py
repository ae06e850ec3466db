"""Two nodes: two launchers that meet on the loopback and share a folder; and the Slurm script, under a paper Slurm."""

import os
import shutil
import signal
import stat
import subprocess

import pytest

from finetune.pipeline.launch import free_port
from tests.e2e import launches
from tests.e2e.conftest import ROOT, Workspace

SCRIPT = ROOT / "scripts" / "launch_slurm.sh"


@pytest.mark.slow
def test_two_nodes_share_one_run(pristine, tmp_path):
    """Scratch is each node's own: what rank 0 merges there, the other node must not wait for."""
    shutil.copytree(pristine.folder, tmp_path / "work")
    work = Workspace(tmp_path / "work")
    meet = ["--num_machines", 2, "--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
    nodes = []
    for rank in (0, 1):
        command = launches.accelerate(work, 2, options=[*meet, "--machine_rank", rank])
        command[command.index("--scratch") + 1] = str(tmp_path / f"scratch{rank}")
        nodes.append(launches.begin(work, command))
    texts = launches.outputs(nodes)
    assert [n.returncode for n in nodes] == [0, 0], texts
    assert texts[0].count("train …") == 1 and texts[0].count("merge …") == 1
    assert "…" not in texts[1] and "small  " not in texts[1]
    assert work.show()["stages"]["train"]["metrics"]["processes"] == 2
    assert list((tmp_path / "scratch0").glob("merge/*/manifest.json"))
    assert not list((tmp_path / "scratch1").glob("merge/*"))


def program(folder, name, text):
    path = folder / name
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def slurm(tmp_path):
    """A cluster of two nodes, in files: `srun` runs its command once a node, `scontrol` writes down what it is told."""
    tools = tmp_path / "tools"
    tools.mkdir()
    program(
        tools, "scontrol", 'if [ "$1" = show ]; then printf "%s\\n" 127.0.0.1 node2; else echo "$@" >> "$CALLS"; fi\n'
    )
    program(
        tools, "srun",
        'shift\npids=()\ntrap \'kill -TERM "${pids[@]}"\' TERM\n'
        'for n in 0 1; do SLURM_NODEID=$n "$@" & pids+=($!); done\n'
        'status=0\nfor p in "${pids[@]}"; do\n'
        '  while kill -0 "$p" 2>/dev/null; do s=0; wait "$p" || s=$?; done; [ $s = 0 ] || status=$s\n'
        "done\nexit $status\n",
    )  # fmt: skip
    settings = {
        "PATH": f"{tools}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "SLURM_JOB_ID": str(free_port()),
        "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_SUBMIT_DIR": str(tmp_path / "project"),
    }  # fmt: skip
    (tmp_path / "project").mkdir()
    return tools, settings


def test_the_script_starts_one_launcher_a_node(slurm, tmp_path):
    tools, settings = slurm
    program(tools, "accelerate", 'sleep "0.$SLURM_NODEID"; printf "%s " "$@"; echo\n')
    done = subprocess.run(
        [SCRIPT, "mine", "--set", "name=two words"], env={**os.environ, **settings}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    port = 20000 + int(settings["SLURM_JOB_ID"]) % 10000
    for node, line in enumerate(done.stdout.splitlines()):
        launch = f"--machine_rank {node} --config_file recipes/accelerate/ddp.yaml --num_machines 2 --num_processes 2"
        rest = f"--main_process_ip 127.0.0.1 --main_process_port {port} -m finetune run mine --set name=two words"
        assert line.split() == f"launch {launch} {rest}".split()
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize(("status", "calls"), [(1, True), (0, False)])
def test_a_preempted_job_goes_back_into_the_queue_unless_it_was_done(status, calls, slurm, tmp_path):
    tools, settings = slurm
    program(
        tools, "accelerate",
        f'trap "exit {status}" TERM; touch "$CALLS.$SLURM_NODEID"; while true; do sleep 0.05; done\n',
    )  # fmt: skip
    job = subprocess.Popen([SCRIPT, "mine"], env={**os.environ, **settings}, stderr=subprocess.PIPE, text=True)
    launches.wait_until(lambda: all((tmp_path / f"calls.{n}").exists() for n in (0, 1)), job)
    job.send_signal(signal.SIGTERM)  # what --signal=B:TERM@120 does to the batch shell, and to nothing else
    text = job.communicate(timeout=60)[1]
    assert job.returncode == status, text
    assert (tmp_path / "calls").exists() == calls
    if calls:
        assert (tmp_path / "calls").read_text() == f"requeue {settings['SLURM_JOB_ID']}\n"


def test_the_script_without_slurm_says_how_it_is_used():
    done = subprocess.run([SCRIPT, "mine"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "sbatch" in done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_script_is_clean():
    done = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True, check=False)
    assert done.stdout == ""
