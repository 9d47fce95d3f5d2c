#!/bin/sh
# What only a GPU can show: the tests of tests/gpu, each file in a process of its own so that one that breaks the device
# takes no other along, then NVIDIA's memory checker over every kernel on small odd shapes.
#
#   kernels/gpu_check.sh [FOLDER]      logs and summary.md go to FOLDER, build/gpu_check if it is not named
#
#   PYTHON   the interpreter, python3 if it is not set
#   COMMIT   what is being tested, where the checkout has no git
#   LIMIT    seconds for a file of tests, 240; SANITIZE: seconds for the memory checker, 240, none when it is 0
set -u
cd "$(dirname "$0")/.." || exit 2
out=${1:-build/gpu_check}
python=${PYTHON:-python3}
commit=${COMMIT:-$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)}
git diff --quiet HEAD -- kernels tests 2>/dev/null || commit="$commit (files differ from it, or git is not here)"
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/eval${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
source='import bench_timing, pathlib; print(bench_timing.kernel_source(pathlib.Path("kernels")))'
mkdir -p "$out"
# Most of the time goes into compiling: two processes a file where pytest-xdist is there.
"$python" -c 'import xdist' 2>/dev/null && parallel="-n ${WORKERS:-2}" || parallel=

for file in tests/gpu/test_*.py; do
    name=$(basename "$file" .py)
    (
        timeout "${LIMIT:-240}" "$python" -m pytest -q -s -p no:cacheprovider $parallel -m gpu "$file" >"$out/$name.log" 2>&1
        echo $? >"$out/$name.rc"
    ) &
done
# This one also leaves the compiled kernels in Triton's cache, so that the memory checker finds them.
(
    timeout "${LIMIT:-240}" "$python" kernels/bench.py --small >"$out/small.log" 2>&1
    echo $? >"$out/small.rc"
) &
wait

sanitized="not run"
if [ "${SANITIZE:-240}" != 0 ] && command -v compute-sanitizer >/dev/null; then
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "${SANITIZE:-240}" \
        compute-sanitizer --tool memcheck --padding 4096 --error-exitcode 9 --log-file "$out/memcheck.txt" \
        "$python" kernels/bench.py --small >"$out/memcheck.log" 2>&1
    sanitized="exit code $?; $(grep -c '^ok ' "$out/memcheck.log") cases; $(tail -n 1 "$out/memcheck.txt" 2>/dev/null)"
fi

failed=0
{
    echo "Commit $commit, kernels $("$python" -c "$source"), $(date -u +%Y-%m-%d), $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader)"
    "$python" -c 'import torch, triton; print(f"torch {torch.__version__}, Triton {triton.__version__}")'
    echo
    for rc in "$out"/*.rc; do
        name=$(basename "$rc" .rc)
        [ "$(cat "$rc")" = 0 ] || failed=1
        echo "- $name: exit code $(cat "$rc"); $(tail -n 1 "$out/$name.log")"
    done
    echo "- compute-sanitizer memcheck: $sanitized"
} >"$out/summary.md"
grep -hA3 '^E  ' "$out"/test_*.log | cut -c 1-200 >"$out/errors.txt"
grep -h '^FAILED\|^ERROR\|^wrong\|Error:' "$out"/test_*.log "$out/small.log" | cut -c 1-300 >"$out/failed.txt"
cat "$out/summary.md" "$out/failed.txt"
case $sanitized in "not run" | "exit code 0;"*) ;; *) failed=1 ;; esac
exit $failed
