#!/usr/bin/env bash
# Everything that a GPU machine is asked, in under 8 minutes on one GPU: its tests, then the benchmarks.
#
#   benchmarks/gpu.sh [--dry-run] [FOLDER]     (FOLDER: for the results; default benchmarks/results/DATE-gpu)
#
# Needs this repository, a Python with torch (PYTHON=..., else .venv's, else python3) and the packages that a PyTorch
# image lacks (omegaconf, wandb, submitit; DALI and timm where they are to be compared). Each part has its own limit, and
# one that fails does not keep the next from running. One JSON a part, and log.txt with all that they said. PARTS="norms
# fits" runs only these. Without a GPU it runs what a CPU can, on tiny sizes, to show that the script is whole: those
# figures mean nothing.
set -u
cd "$(dirname "$0")/.."
dry=""
if [ "${1:-}" = --dry-run ]; then dry=yes; shift; fi
out=${1:-benchmarks/results/$(date +%F)-gpu}
python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
budget=${BUDGET:-465} # seconds for all parts together
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

gpu=""
if [ -n "$dry" ]; then
  gpu=${GPU-yes}
else
  if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then gpu=yes; fi
  mkdir -p "$out"
  : >"$out/log.txt"
fi

failed=0
part() { # NAME SECONDS COMMAND...; LIMIT in it: the seconds, less those that a part needs to say its result
  local name=$1 limit=$2 left=$((budget - SECONDS)) began=$SECONDS status
  shift 2
  case " ${PARTS:-$name} " in *" $name "*) ;; *) return ;; esac
  if [ "$left" -lt "$limit" ]; then limit=$left; fi
  local command=("${@//LIMIT/$((limit - 10))}")
  if [ -n "$dry" ]; then echo "$name (at most $limit s): ${command[*]}"; return; fi
  if [ "$limit" -lt 15 ]; then echo "== $name: no time is left" | tee -a "$out/log.txt"; failed=1; return; fi
  echo "== $name (at most $limit s)" | tee -a "$out/log.txt"
  timeout --kill-after=10 "$limit" "${command[@]}" >"$out/part.txt" 2>&1
  status=$?
  cat "$out/part.txt" >>"$out/log.txt"
  tail -25 "$out/part.txt"
  rm -f "$out/part.txt"
  echo "== $name: exit status $status after $((SECONDS - began)) s" | tee -a "$out/log.txt"
  [ "$status" = 0 ] || failed=1
}

if [ -n "$gpu" ]; then
  part tests 95 "$python" benchmarks/gpu_tests.py --out "$out/tests.json"
  part norms 35 "$python" benchmarks/norms.py --out "$out/norms.json"
  few=(--blocks 4 --steps 15 --start-within 240 --within LIMIT)
  part step-peers 130 "$python" benchmarks/step.py "${few[@]}" --out "$out/step-peers.json" \
    --only examples torchvision timm convnets compiled ours "ours fused"
  # A graph holds its memory while others run, so they are few at a time, with timm's step to compare with.
  part step-ours 70 "$python" benchmarks/step.py "${few[@]}" --out "$out/step-ours.json" \
    --only timm "ours graph" "ours fused graph" "ours packed" "ours all"
  part input 55 "$python" benchmarks/input.py --within 30 --out "$out/input.json"
  part end-to-end 30 "$python" benchmarks/input.py --only default "hardware 0.9" --precision fused=true \
    cuda_graph=true --out "$out/end-to-end.json"
  part fits 45 "$python" benchmarks/fits.py --only ours "ours fused graph" timm --within 40 --out "$out/fits.json"
  # In what the parts above have left; alone (PARTS="end-to-end-peers tests-folded step-folded") these have all of it.
  part end-to-end-peers 110 "$python" benchmarks/step.py "${few[@]}" --draw 512 --workers 12 \
    --out "$out/end-to-end-peers.json" --only timm convnets ours "ours fused graph"
  part tests-folded 60 "$python" benchmarks/gpu_tests.py tests/test_folded.py --out "$out/tests-folded.json"
  part step-folded 110 "$python" benchmarks/step.py "${few[@]}" --out "$out/step-folded.json" \
    --only timm "ours fused" "ours folded" "ours folded graph"
  # Last, because autotuning takes what is left; alone it has all of it (PARTS=step-compiled).
  part step-compiled 400 "$python" benchmarks/step.py "${few[@]}" --out "$out/step-compiled.json" \
    --only timm compiled-max "ours compiled" "ours compiled graph"
else
  part tests 400 "$python" benchmarks/gpu_tests.py --out "$out/tests.json"
  part norms 400 "$python" benchmarks/norms.py --out "$out/norms.json"
  part step 400 "$python" benchmarks/step.py --batch 2 --size 32 --blocks 1 --steps 1 --within LIMIT \
    --only timm ours --out "$out/step.json"
  part input 400 "$python" benchmarks/input.py --blocks 1 --only default --out "$out/input.json"
  part fits 400 "$python" benchmarks/fits.py --out "$out/fits.json"
fi
if [ -n "$dry" ]; then exit 0; fi
echo "results are in $out"
exit "$failed"
