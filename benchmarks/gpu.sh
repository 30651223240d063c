#!/usr/bin/env bash
# For the day a GPU is at hand for fifteen minutes: what is worth most first, and everything goes on when started again.
#
#     CIFAR=DIR benchmarks/gpu.sh                  DIR/train/<class>/*, DIR/test/<class>/*: CIFAR-10 as images
#     CIFAR=DIR OUT=results/gpu TESTS_S=60 benchmarks/gpu.sh      where the results go; seconds for a stage
#
# Stages: the tests that take a device; the cost of a step of each method, in float32, TF32, bfloat16, and channels_last,
# with the error of the penalty beside it; the fast recipe undefended and with the penalty; ResNeXt-34 as far
# as the time reaches; then both fast networks attacked.  A stage ends at its limit; one that has ended well is not done
# again, and training goes on from its checkpoint.  OUT/gpu.md has the card, the commit, and what each stage said last.
# With DRY=1 the commands are printed and nothing is run; DEVICE=cpu is for the test of this script.
set -uo pipefail
cd "$(dirname "$0")/.."
: "${CIFAR:?is not set: the folder with train/<class>/* and test/<class>/* of CIFAR-10}"
OUT=${OUT:-results/gpu} DEVICE=${DEVICE:-cuda} PYTHON=${PYTHON:-python} DRY=${DRY:-}
read -ra TESTS <<<"${TESTS:-}"                                    # which of the tests
read -ra COST <<<"${COST:---batch-size 128 --repeats 10 --h 0.3}" # of benchmarks/penalty.py
read -ra FAST <<<"${FAST:---recipe fast}"                         # of train.py: the fast recipe at full width
read -ra LARGE <<<"${LARGE:---model resnext34 --epochs 20 --h 0.3 --amp --channels-last}"
read -ra ATTACKED <<<"${ATTACKED:---images 200 --calibration 200 --audit-images 20}"
WAYS=${WAYS:-float32 tf32 bfloat16 channels_last bfloat16+channels_last}
export GRADREG_TEST_DEVICE=$DEVICE PYTHONUNBUFFERED=1
failed=0
[ "$DRY" ] || mkdir -p "$OUT"

stage() { # stage NAME SECONDS ARGUMENTS...: python with these; what it prints goes to OUT/NAME.log
    local name=$1 seconds=$2 code
    shift 2
    echo "$PYTHON ${*@Q}"
    if [ "$DRY" ] || [ -e "$OUT/$name.done" ]; then return; fi
    timeout --kill-after=30 "$seconds" "$PYTHON" "$@" >>"$OUT/$name.log" 2>&1
    code=$?
    tail -n 3 "$OUT/$name.log"
    case $code in
    0) touch "$OUT/$name.done" ;;
    124) echo "$name: the time for it is up" | tee -a "$OUT/$name.log" ;;
    *) echo "$name: failed with exit code $code, see $OUT/$name.log" && failed=1 ;;
    esac
}

train() { # train NAME SECONDS OPTIONS...: a network, from its checkpoint if it has one
    local name=$1 seconds=$2
    shift 2
    stage "$name" "$seconds" train.py cifar10 --data-dir "$CIFAR" --runs "$OUT/runs" --name "$name" --device "$DEVICE" \
        --checkpoint-minutes 1 "$@"
}

ways=()
for way in $WAYS; do ways+=(--way "$way"); done
stage tests "${TESTS_S:-120}" -m pytest -q tests/test_device.py "${TESTS[@]}"
stage cost-resnext34 "${COST_S:-120}" benchmarks/penalty.py --device "$DEVICE" --time "${ways[@]}" "${COST[@]}"
stage cost-resnet9 "${COST_S:-120}" benchmarks/penalty.py --device "$DEVICE" --time "${ways[@]}" --model resnet9 "${COST[@]}"
train fast-none "${FAST_S:-150}" --method none "${FAST[@]}"
train fast-fd "${FAST_S:-240}" --method fd --norm l2 --lam 0.1 "${FAST[@]}"
train resnext34-fd "${LARGE_S:-240}" --method fd --norm l2 --lam 0.1 "${LARGE[@]}"
stage attacked "${ATTACKED_S:-240}" evaluate.py "$OUT/runs/fast-none" "$OUT/runs/fast-fd" --device "$DEVICE" \
    --out "$OUT/evaluation" "${ATTACKED[@]}"

[ "$DRY" ] && exit
{
    echo "# What a GPU said"
    echo
    "$PYTHON" -c "import torch, runs; print(runs.provenance(runs.World('$DEVICE')))"
    for log in tests cost-resnext34 cost-resnet9 fast-none fast-fd resnext34-fd attacked; do
        printf '\n## %s%s\n\n```\n' "$log" "$([ -e "$OUT/$log.done" ] || echo ': not to its end')"
        tail -n 40 "$OUT/$log.log"
        echo '```'
    done
} >"$OUT/gpu.md"
exit "$failed"
