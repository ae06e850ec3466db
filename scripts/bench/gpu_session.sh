#!/usr/bin/env bash
# What a lent GPU is asked, in parts that fit a short lease; from the repository's root:
#   scripts/bench/gpu_session.sh OUT WHEELS PART…       WHEELS: a folder of what the machine lacks, or - for none
# PART: tests (the gpu tests), memory:SECONDS (training_memory.py at 7B), ladder:LETTERS:SECONDS (train_throughput.py at 7B),
# both (tests beside memory). OUT gets a log, table and JSON of each.
set -uo pipefail
out=${1:?where the results go}; wheels=${2:?wheels}; shift 2
cd "$(dirname "$0")/../.."
mkdir -p "$out"; out=$(cd "$out" && pwd); work=${GPU_WORK:-/tmp/gpu_session}
python=python3
if [ -d "$wheels" ]; then
  [ -d "$work/site" ] || python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$work/site" "$wheels"/*.whl
  export PYTHONPATH="$work/site:$PWD"
else
  [ -x .venv/bin/python ] && python=$PWD/.venv/bin/python
  export PYTHONPATH=$PWD
fi
mkdir -p "$work"
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
"$python" - <<'PY' || exit 1
import accelerate, bitsandbytes, datasets, peft, torch, transformers, trl
print(torch.__version__, torch.version.cuda, [m.__version__ for m in (transformers, trl, peft, bitsandbytes)])
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
PY

tests() {
  timeout 150 "$python" -m pytest -q -m gpu -p no:cacheprovider --basetemp "$work/tests" --durations=5 \
    tests/models/test_attention.py tests/models/test_loading.py tests/dedup/test_index.py \
    tests/lora/test_fused_linear.py tests/stages/test_align.py tests/gpu \
    >"$out/gpu_tests.log" 2>&1
  tail -25 "$out/gpu_tests.log"
}

memory() {
  "$python" scripts/bench/training_memory.py --model 7b --out "$work/memory" --budget "$1" 2>"$out/memory.log"
  cp "$work"/memory/*.json "$work"/memory/*.md "$out/"
}

ladder() {
  timeout $(($2 + 30)) "$python" scripts/bench/train_throughput.py --all --model 7b --device cuda --out "$work/ladder" \
    --steps 5 --skip 2 --budget "$2" --threads 8 --only "$1"
  cp "$work/ladder/table.md" "$out/table-$1.md"; cp "$work/ladder/all.json" "$out/ladder-$1.json"
  (cd "$work/ladder" && tar -czf "$out/logs-$1.tar.gz" ./*.log)
}

for part in "$@"; do
  echo "== $part, after $SECONDS s"
  case $part in
    tests) tests ;;
    memory:*) memory "${part#*:}" ;;
    both) tests & memory 110; wait ;;
    ladder:*) IFS=: read -r _ letters seconds <<<"$part"; ladder "$letters" "$seconds" ;;
    *) echo "no such part: $part" >&2; exit 2 ;;
  esac
done
echo "== done after $SECONDS s"
