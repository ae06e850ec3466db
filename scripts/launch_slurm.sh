#!/usr/bin/env bash
# Train a recipe on a Slurm cluster, on one node or several, one process a GPU.
#
#   sbatch scripts/launch_slurm.sh RECIPE [--set a.b=value] [--until STAGE] …
#   sbatch --nodes=4 --gpus-per-node=8 --time=4:00:00 scripts/launch_slurm.sh mistral-guanaco
#
# Submit it from the folder of the project, with its .venv made (`make setup`) or an environment active that has
# `accelerate` and `finetune`. That folder must be seen by every node: rows, checkpoints and models lie in it.
#
#   FINETUNE_ARTIFACTS   another shared folder for rows, checkpoints and adapters   (default: ./artifacts)
#   FINETUNE_SCRATCH     downloads and merged models; a node's own disk is faster, but is
#                        wiped when the job ends, and the merged model with it       (default: ./scratch)
#   FINETUNE_CONFIG      which file of recipes/accelerate                            (default: ddp)
#
# Two minutes before the time limit, and on preemption, Slurm sends TERM: every rank saves one checkpoint, the job goes
# back into the queue, and the same job goes on from there. A finished recipe ends at once.
#SBATCH --job-name=finetune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=finetune-%j.log
set -euo pipefail

if [ $# -eq 0 ] || [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "usage: sbatch $0 RECIPE [options of finetune run]" >&2
  exit 2
fi

cd "${SLURM_SUBMIT_DIR:-.}"
if [ -d .venv/bin ]; then
  PATH="$PWD/.venv/bin:$PATH"
fi
export FINETUNE_ARTIFACTS="${FINETUNE_ARTIFACTS:-$PWD/artifacts}"
export FINETUNE_SCRATCH="${FINETUNE_SCRATCH:-$PWD/scratch}"
export PYTHONSAFEPATH=1 # `-m finetune` would put the submit folder, and any json.py in it, before Python's own modules
export TORCHELASTIC_SHUTDOWN_TIMEOUT=100 # seconds for the checkpoint; the launcher's own 30 may be too few for a step

nodes="${SLURM_NNODES:-1}"
gpus="${SLURM_GPUS_ON_NODE:-1}"
first_node="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
first_node="${first_node%%$'\n'*}"
launch=(
  accelerate launch
  --config_file "recipes/accelerate/${FINETUNE_CONFIG:-ddp}.yaml"
  --num_machines "$nodes"
  --num_processes "$((nodes * gpus))"
  --main_process_ip "$first_node"
  --main_process_port "$((20000 + SLURM_JOB_ID % 10000))"
)

stopped=
trap 'stopped=1; kill -TERM "$step" 2>/dev/null || true' TERM

# --machine_rank is known only on the node itself, hence the inner shell; "$@" there is the launch and its arguments.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c 'exec "${@:1:2}" --machine_rank "$SLURM_NODEID" "${@:3}"' launch \
  "${launch[@]}" -m finetune run "$@" &
step=$!

status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do # TERM ends a wait, not the step
  status=0
  wait "$step" || status=$?
done
if [ -n "$stopped" ] && [ "$status" -ne 0 ]; then
  echo "stopped before it was done: back into the queue, to go on from the last checkpoint" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
