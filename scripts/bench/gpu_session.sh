#!/usr/bin/env bash
# One call on a lent GPU, under 9 minutes: the gpu tests, then the ladder of train_throughput.py at 7B.
#   scripts/bench/gpu_session.sh OUT [WHEELS]        from the repository's root
# OUT gets gpu_tests.log, table.md, all.json and logs.tar.gz. WHEELS (default .whl) is a folder of the wheels that the
# machine lacks, installed beside its own packages; without one its python3, or .venv, must have them all.
set -uo pipefail
out=${1:?where the results go}; wheels=${2:-.whl}
cd "$(dirname "$0")/../.."
mkdir -p "$out"; out=$(cd "$out" && pwd); work=$(mktemp -d)
python=python3
if [ -d "$wheels" ]; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$work/site" "$wheels"/*.whl
  export PYTHONPATH="$work/site:$PWD"
else
  [ -x .venv/bin/python ] && python=$PWD/.venv/bin/python
  export PYTHONPATH=$PWD
fi
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
"$python" - <<'PY' || exit 1
import accelerate, bitsandbytes, datasets, peft, torch, transformers, trl
print(torch.__version__, torch.version.cuda, [m.__version__ for m in (transformers, trl, peft, bitsandbytes)])
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
PY
timeout 150 "$python" -m pytest -q -m gpu -p no:cacheprovider --basetemp "$work/tests" \
  tests/backends/test_attention.py tests/backends/test_models.py tests/gpu 2>&1 | tee "$out/gpu_tests.log" | tail -25

left=$((520 - SECONDS))
timeout $((left + 10)) "$python" scripts/bench/train_throughput.py --all --model 7b --device cuda --out "$work/ladder" \
  --steps 6 --skip 3 --budget $((left - 20)) --threads 8
cp "$work/ladder/table.md" "$work/ladder/all.json" "$out/"
tar -C "$work/ladder" -czf "$out/logs.tar.gz" --exclude 'checkpoint*' $(cd "$work/ladder" && ls ./*.log)
rm -rf "$work"
