#!/usr/bin/env bash
# Fifteen minutes of one GPU, the most valuable first. Every row is printed, and kept in OUT/rows.txt, as it comes:
#   scripts/bench/gpu_session.sh OUT [WHEELS [PART…]]
# WHEELS: a folder of what the machine lacks (- for none), WHEELS/unsloth one for Unsloth. PART: some of those below.
# Without a GPU the same on a tiny base, to see that it runs: GPU_SESSION_DEVICE=cpu [GPU_SESSION_SECONDS=600].
set -uo pipefail
out=${1:?where the results go}; wheels=${2:--}; shift $(($# < 2 ? $# : 2))
cd "$(dirname "$0")/../.."
mkdir -p "$out"; out=$(cd "$out" && pwd)
device=${GPU_SESSION_DEVICE:-cuda}; total=${GPU_SESSION_SECONDS:-870}  # 14.5 minutes
work=${GPU_WORK:-/tmp/gpu_session}; mkdir -p "$work"
model=7b; threads=8; layers=(--layers 22 --hidden 2048)
[ "$device" = cpu ] && { model=tiny; threads=1; layers=(--layers 2 --hidden 256); }

row() { echo "$*" | tee -a "$out/rows.txt"; }
install() {  # FOLDER TARGET
  [ -d "$2" ] || python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$2" "$1"/*.whl
}
python=python3; export PYTHONPATH=$PWD
if [ -d "$wheels" ]; then
  install "$wheels" "$work/site"; PYTHONPATH="$work/site:$PWD"
elif [ -x .venv/bin/python ]; then
  python=$PWD/.venv/bin/python
fi
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false TORCHINDUCTOR_CACHE_DIR="$work/compiled"

# NAME SECONDS COMMAND…: its rows as they come; what it says besides is in OUT/NAME.log. Never past the end of all.
part() {
  local name=$1 limit=$2 left=$((total - SECONDS)); shift 2
  ((left < limit)) && limit=$left
  if ((limit < 5)); then row "$name: no time left"; return; fi
  row "== $name: at most $limit s, after $SECONDS s"
  timeout -k 5 "$limit" "$@" 2>>"$out/$name.log" | tee -a "$out/rows.txt"
  local status=${PIPESTATUS[0]}
  ((status == 0)) || row "$name: status $status (124: out of time); $(tail -n 1 "$out/$name.log" 2>/dev/null | cut -c1-300)"
}
ladder() {  # NAME SECONDS LETTERS [STEPS SKIP]
  part "$1" "$2" "$python" scripts/bench/train_throughput.py --all --model "$model" --device "$device" --out "$work/ladder" \
    --steps "${4:-5}" --skip "${5:-2}" --threads "$threads" --budget "$2" --only "$3"
  cp "$work/ladder/table.md" "$out/table-$1.md" 2>/dev/null; cp "$work/ladder/all.json" "$out/ladder-$1.json" 2>/dev/null
}
memory() {  # NAME SECONDS ONLY
  part "$1" "$2" "$python" scripts/bench/training_memory.py --model "$model" --device "$device" --out "$work/memory" --only "$3"
  cp "$work"/memory/training_memory.* "$out/" 2>/dev/null
}

run() {
  case $1 in
    tests)
      part tests 150 "$python" -m pytest -q -m gpu -p no:cacheprovider --basetemp "$work/tests" \
        tests/models/test_attention.py tests/models/test_loading.py tests/dedup/test_index.py \
        tests/lora tests/stages/test_align.py tests/gpu ;;
    unsloth)  # and ours beside it, best settings of both
      ladder ours 150 J
      if [ -d "$wheels/unsloth" ]; then
        install "$wheels/unsloth" "$work/unsloth"
        PYTHONPATH="$work/unsloth:$PWD" ladder unsloth 120 M
      else
        row "unsloth: not in WHEELS/unsloth, so not run"
      fi ;;
    changing) ladder changing 120 O 12 3 ;;
    ladder) ladder ladder 220 ADEFGN ;;
    fp16) ladder fp16 60 P 20 3 ;;
    rows) memory rows 80 "nothing recomputed" ;;
    peaks) memory peaks 150 "" ;;
    first_step) part first_step 90 "$python" scripts/bench/time_to_first_step.py "${layers[@]}" --repeat 1 --scratch "$work/first" ;;
    decode) part decode 60 "$python" scripts/bench/decode.py --model "$model" --device "$device" ;;
    *) echo "no such part: $1" >&2; exit 2 ;;
  esac
}

row "device $device, model $model, $(date -u +%FT%TZ), commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
part versions 60 "$python" - <<'PY'
import accelerate, bitsandbytes, datasets, peft, torch, transformers, trl
print(torch.__version__, torch.version.cuda, [m.__version__ for m in (transformers, trl, peft, bitsandbytes)])
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")
PY
(($#)) || set -- tests unsloth changing ladder fp16 rows peaks first_step decode
for name in "$@"; do run "$name"; done
row "== done after $SECONDS s"
