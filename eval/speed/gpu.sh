#!/bin/sh
# On a machine with one H100 or H200, within ten minutes: the tests that need a GPU, then every table of speed. Not yet run on one.
#   [OUT=FOLDER] eval/speed/gpu.sh [PEERS]     PEERS: the folder that eval/speed/peers.sh filled; without it llmkd is measured alone
# Each part may take the seconds that stand before it, 590 in all, and one that fails or is cut off stops no other; tables are written to
# OUT, by default eval/speed/results. What is expected: tests 60; head 70, of which compiling Liger's loss 30; llama 140 (loading 40,
# compiling 30, steps of 16k tokens 1 to 2 s each); qwen 90; epoch 60; profile 45.
mkdir -p "${OUT:=$(dirname "$0")/results}"
out=$(cd "$OUT" && pwd) peers=${1:+--peers $(cd "$1" && pwd)} failed=0
cd "$(dirname "$0")/../.." || exit 1

part() { # seconds, name, command: its time and how it ended, to stderr
    seconds=$1 name=$2 begun=$(date +%s)
    shift 2
    timeout -k 5 "$seconds" "$@"
    code=$?
    [ $code -eq 0 ] || failed=1
    echo "$name: exit code $code after $(($(date +%s) - begun)) s of $seconds" >&2
}

step="python eval/speed/step.py --batch 128 --tokens 16384 --steps 3 --repeats 2 --compile --float8 $peers"
part 80 tests python -m pytest -q -m gpu
# shellcheck disable=SC2086
head="python eval/speed/head.py --rounds 3 --vocab 128256 --rows 8192 --width 2048 --teacher_width 4096 $peers"
part 60 head $head --supervised 1 --out "$out/head_gpu.md"
part 60 half $head --supervised 0.5 --out "$out/head_half_gpu.md"
part 190 llama $step --shapes llama --out "$out/step_llama_gpu.md"
part 100 qwen $step --shapes qwen --out "$out/step_qwen_gpu.md"
part 50 epoch sh -c 'python eval/speed/epoch.py --steps 6 --rounds 2 --students 1 4 > "$0.part" && mv "$0.part" "$0"' "$out/epoch_gpu.md"
part 50 profile python eval/speed/profile_step.py --packed --compile --shapes llama --batch 128 --tokens 16384 --out "$out/profile_gpu.md"
exit $failed
