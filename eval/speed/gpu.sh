#!/bin/sh
# On a machine with one GPU (an H100 or H200), within eight minutes: facts first, then tests, then tables of speed. Not yet run on one.
#   [OUT=FOLDER] [WHEELS=FOLDER] [SECONDS_IN_ALL=480] sh eval/speed/gpu.sh [PEERS]
# OUT     logs and tables, by default eval/speed/results/gpu; the last lines printed are one table of all parts and facts
# WHEELS  a folder with the packages that the machine lacks, for Python 3.12; where there is a network, sh eval/speed/gpu.sh wheels build/wheels fills it in an environment of llmkd
# PEERS   the folder that eval/speed/peers.sh filled; without it llmkd is measured alone
# Each part may take the seconds before its name, or those that are left; one that fails or is cut off stops no other, and for what no time is
# left is left out. A signal (TERM, INT) ends it at once with the table of what is there; after a kill `python3 eval/speed/gpu_facts.py table OUT`
# prints that. Without a GPU everything runs on the CPU, in small, to see that it runs.
set -u
if [ "${1:-}" = wheels ]; then # as they are installed here; PyTorch, Triton, transformers, accelerate and pytest are there
    folder=${2:?name a folder} versions='import sys, importlib.metadata as m; print(*(f"{name}=={m.version(name)}" for name in sys.argv[1:]))'
    names=$(python3 -c "$versions" annotated-types bitsandbytes datasets dill multiprocess peft pydantic pydantic_core shtab typing-inspection) || exit 1
    # shellcheck disable=SC2086
    python3 -m pip download -q --no-deps --only-binary :all: --implementation cp --python-version 3.12 --platform manylinux_2_28_x86_64 \
        --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --dest "$folder" $names || exit 1
    size=$(git ls-files | xargs cat "$folder"/*.whl | wc -c)
    echo "$names: with the repository $((size >> 20)) MiB"
    [ "$size" -lt $((64 << 20)) ] # what is carried there
    exit
fi
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "${OUT:=$here/results/gpu}"
out=$(cd "$OUT" && pwd) peers=${1:+--peers $(cd "$1" && pwd)} all=${SECONDS_IN_ALL:-480} failed=0
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 TQDM_DISABLE=1
cd "$here/../.." || exit 1
begun=$(date +%s) child=
: >"$out/parts.tsv"
rm -f "$out/table.md"
table() { python3 eval/speed/gpu_facts.py table "$out" | tee "$out/table.md"; }
stopped() { # the part that runs gets the signal too
    [ -z "$child" ] || kill "$child" 2>/dev/null
    printf '%s\tstopped\t%s\t%s\n' "$name" $(($(date +%s) - since)) "$limit" >>"$out/parts.tsv"
    table
    exit 143
}
name=wheels since=$begun limit=0
trap stopped TERM INT
if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH="$site:$PWD${PYTHONPATH:+:$PYTHONPATH}"
fi

part() { # seconds, name, command: its output to OUT/NAME.log, how it ended to OUT/parts.tsv
    limit=$1 name=$2 since=$(date +%s)
    shift 2
    rm -f "$out/$name.log" "$out"/*"${name}_gpu.md" # of an earlier run
    left=$((all - since + begun))
    [ "$limit" -le "$left" ] || limit=$left
    if [ "$limit" -lt 5 ]; then
        printf '%s\tskipped\t0\t0\n' "$name" >>"$out/parts.tsv"
        return
    fi
    timeout -k 3 "$limit" "$@" >"$out/$name.log" 2>&1 &
    child=$!
    wait $child
    code=$? child=
    [ $code -eq 0 ] || failed=1
    took=$(($(date +%s) - since))
    printf '%s\t%s\t%s\t%s\n' "$name" "$code" "$took" "$limit" >>"$out/parts.tsv"
    echo "$name: exit code $code after $took s of $limit" >&2
    [ $code -eq 0 ] || tail -n 15 "$out/$name.log" | cut -c 1-300 >&2
}

facts="python3 eval/speed/gpu_facts.py" tests="python3 -m pytest -v --tb=short -p no:cacheprovider -m gpu"
if python3 -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2>/dev/null; then
    head="--vocab 128256 --rows 8192 --width 2048 --teacher_width 4096 --rounds 3"
    step="--batch 128 --tokens 16384 --steps 2 --repeats 1 --float8"
    llama="--shapes llama" qwen="--shapes qwen"
else
    head="--vocab 2048 --rows 64 --width 32 --teacher_width 64 --rounds 1"
    step="--hidden 32 --layers 1 --vocab 211 --batch 4 --tokens 512 --steps 1 --repeats 1"
    llama="" qwen="--family qwen2"
fi
# shellcheck disable=SC2086
{
    part 60 imports $facts imports
    part 60 primitives $facts primitives
    part 90 tests $tests tests/test_gpu.py tests/models/test_float8.py -k "not qlora and not compiled"
    part 60 head python3 eval/speed/head.py $head --supervised 0.5 $peers --out "$out/head_gpu.md"
    part 110 plan $facts plan # a step's time, and its memory against the plan
    part 70 slower_tests $tests tests/test_gpu.py tests/models/test_teacher_transforms.py -k "qlora or compiled or transforms"
    part 100 qwen python3 eval/speed/step.py $step $qwen $peers --out "$out/step_qwen_gpu.md"
    part 120 llama python3 eval/speed/step.py $step $llama $peers --out "$out/step_llama_gpu.md"
    part 50 profile python3 eval/speed/profile_step.py --packed $step $llama --out "$out/profile_gpu.md"
}
trap - TERM INT
table
exit $failed
