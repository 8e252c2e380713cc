#!/usr/bin/env bash
# Make the Python environment that d2ft runs in.
#
#   bash tools/setup_env.sh [dev]
#
# "dev" adds what the tests and linters need. Messages go to stderr; the one line on stdout is the
# Python to use, so that another script can write  python=$(bash tools/setup_env.sh)
#
# A Detectron2 that the active Python can already import is used as it is, and only what d2ft lacks
# is added beside it. Otherwise everything is installed in .venv in the project root. The second run
# reuses all; a run that was interrupted is completed by the next. All of pip's configuration
# applies: PIP_EXTRA_INDEX_URL, for one, can lead it to a smaller build of torch without CUDA.
#
# D2FT_PYTHON=/path/to/python chooses the Python, which must be 3.10, 3.11 or 3.12.
set -euo pipefail

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." > /dev/null && pwd -P)

# torchvision has compiled code that fits one torch only, so the two change together.
TORCH=torch==2.14.1
TORCHVISION=torchvision==0.29.1

VENV=$ROOT/.venv
MADE_BY_US=$VENV/.made-by-d2ft
WORK=$ROOT/build/set-up # ignored by git, and outside .venv so that it survives its removal
LOG=$WORK/setup.log
STEP=

say() { printf '[d2ft set-up] %s\n' "$@" >&2; }

fail() {
    say "$@"
    exit 1
}

step() { # NUMBER TEXT [REMARK]
    STEP="step $1/6 ($2)"
    printf '[d2ft set-up %s/6] %s%s ...\n' "$1" "$2" "${3:+ ($3)}" >&2
}

# Run a command with its output in the log. Every 20 s the last line of the log is shown.
logged() {
    printf '\n$ %s\n' "$*" >> "$LOG"
    show_progress &
    local progress=$! status=0
    "$@" < /dev/null >> "$LOG" 2>&1 || status=$?
    kill "$progress" 2> /dev/null || true
    wait "$progress" 2> /dev/null || true
    if [ "$status" -ne 0 ]; then
        say "The last lines of $LOG:"
        tail -n 30 "$LOG" >&2
        fail "$STEP failed: see the lines above. The next run goes on from here."
    fi
}

show_progress() {
    local seconds=0
    # The sleep must not hold the output open: whoever reads it through a pipe would wait for it.
    while sleep 20 > /dev/null 2>&1 && kill -0 $$ 2> /dev/null; do
        seconds=$((seconds + 20))
        printf '    %4d s: %s\n' "$seconds" "$(tail -n 1 "$LOG" | cut -c 1-100)" >&2
    done
}

run_pip() { logged "$PY" -m pip --no-input --disable-pip-version-check "$@"; }

# A version manager's stand-in for a Python may exist and not run, so each candidate is run.
is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))' 2> /dev/null
}

find_python() {
    local name
    for name in python3 python3.11 python3.12 python3.10; do
        if is_supported "$name" && "$name" -c 'import ensurepip, venv' 2> /dev/null; then
            printf '%s' "$name"
            return
        fi
    done
    fail "no Python 3.10, 3.11 or 3.12 with the modules venv and ensurepip was found." \
        "Install one (on Debian and Ubuntu: apt install python3 python3-venv)," \
        "or name the one to use: export D2FT_PYTHON=/path/to/python"
}

# Succeed if this Python has PyTorch and a Detectron2 that somebody else put there.
has_own_detectron2() {
    local status=0 reason
    is_supported "$1" || return 1
    reason=$(
        "$1" - "$VENV" "$MADE_BY_US" 2>&1 << 'PYTHON'
import importlib.util
import os
import sys

venv, made_by_us = sys.argv[1:]
if os.path.realpath(sys.prefix) == os.path.realpath(venv) and os.path.exists(made_by_us):
    sys.exit(3)
spec = importlib.util.find_spec("detectron2")
# Without an origin it is only a folder of that name, such as a git clone.
if spec is None or spec.origin is None or importlib.util.find_spec("torch") is None:
    sys.exit(3)
import torch
import detectron2.config
PYTHON
    ) || status=$?
    if [ "$status" -ne 0 ] && [ "$status" -ne 3 ]; then
        say "the Detectron2 of $1 cannot be imported and is left aside: ${reason##*$'\n'}"
    fi
    [ "$status" -eq 0 ]
}

use_own_environment() { # PYTHON EXTRA...
    PY=$("$1" -c 'import sys; print(sys.executable)')
    shift
    say "Detectron2 is there already: using $PY with its torch and detectron2 as they are."
    "$PY" -c 'import pip' 2> /dev/null || fail "$PY has no pip: try $PY -m ensurepip"
    : > "$LOG"
    local missing
    missing=$("$PY" tools/missing_requirements.py "$@")
    if [ -n "$missing" ]; then
        step 4 "adding what d2ft lacks: ${missing//$'\n'/, }"
        printf '%s\n' "$missing" > "$WORK/missing.txt"
        # What is installed was chosen by its owner: pip may add to it and change nothing.
        "$PY" -m pip list --format=freeze > "$WORK/installed.txt"
        run_pip install -r "$WORK/missing.txt" -c "$WORK/installed.txt"
    fi
    if [ -n "$missing" ] || ! d2ft_is_installed; then
        finish
    fi
}

d2ft_is_installed() {
    # -I: in the project root d2ft could be imported without being installed.
    "$PY" -I -c 'import importlib.util, pathlib, sys
spec = importlib.util.find_spec("d2ft")
sys.exit(spec is None or pathlib.Path(spec.origin).parents[1] != pathlib.Path(sys.argv[1]))' \
        "$ROOT"
}

use_venv() { # EXTRA...
    PY=$VENV/bin/python
    local stamp="$VENV/.complete${1:+-$1}" key
    check_venv
    # The project's path belongs to it because d2ft is installed from there.
    key="$ROOT $(cat setup.py tools/setup_env.sh tools/missing_requirements.py \
        tools/detectron2_requirement.txt tools/repack_detectron2.py | cksum)"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$key" ] && "$PY" -c '' 2> /dev/null; then
        return
    fi
    rm -f "$VENV"/.complete*
    : > "$LOG"
    make_venv
    step 2 "installing ${TORCH/==/ } and ${TORCHVISION/==/ }" \
        "about 5 GB where they come with CUDA: several minutes"
    warn_about_space
    run_pip install "$TORCH" "$TORCHVISION"
    step 3 "installing detectron2"
    install_detectron2
    step 4 "installing what detectron2 and d2ft need"
    "$PY" tools/missing_requirements.py detectron2-deps "$@" > "$WORK/missing.txt"
    run_pip install -r "$WORK/missing.txt"
    finish
    printf '%s\n' "$key" | tee "$stamp" > "$VENV/.complete"
}

check_venv() {
    if [ -e "$VENV" ] && [ ! -e "$MADE_BY_US" ]; then
        fail "$VENV was not made by this set-up and has no usable detectron2 and torch." \
            "Install Detectron2 in it, or move it away to have one made here."
    fi
    if [ -n "${D2FT_PYTHON:-}" ]; then
        local version='import sys; print("Python %d.%d" % sys.version_info[:2])' wanted present
        wanted=$("$D2FT_PYTHON" -c "$version")
        present=$("$PY" -c "$version" 2> /dev/null || true)
        if [ -n "$present" ] && [ "$present" != "$wanted" ]; then
            fail "$VENV has $present, but D2FT_PYTHON is $wanted: remove .venv or unset D2FT_PYTHON."
        fi
    fi
}

make_venv() {
    if [ -x "$PY" ] && "$PY" -m pip --version > /dev/null 2>&1; then
        step 1 "going on with .venv of an earlier run"
        forget_half_installed
        return
    fi
    local python
    python=${D2FT_PYTHON:-$(find_python)}
    step 1 "making .venv with $("$python" --version) ($python)"
    rm -rf "$VENV"
    mkdir "$VENV"
    : > "$MADE_BY_US"
    logged "$python" -m venv "$VENV"
}

# pip writes RECORD last. Without it a distribution may lack files, though pip takes it for whole.
forget_half_installed() {
    local info
    for info in "$VENV"/lib/python3*/site-packages/*.dist-info; do
        if [ -d "$info" ] && [ ! -f "$info/RECORD" ]; then
            rm -r "$info"
        fi
    done
}

warn_about_space() {
    local free_kb
    free_kb=$(df -Pk "$ROOT" | awk 'NR == 2 { print $4 }')
    if [ "$free_kb" -lt $((8 * 1024 * 1024)) ]; then
        say "only $((free_kb / 1024)) MB are free here; with CUDA libraries .venv needs about 8 GB."
    fi
}

install_detectron2() {
    local pinned
    pinned=$(sed -n 's/^\(sal-detectron2==[^ ]*\) .*/\1/p' tools/detectron2_requirement.txt)
    # Not grep -q: it would end at the match, pip by a closed pipe, and the pipeline as failed.
    if "$PY" -m pip list --format=freeze | grep -xF "$pinned" > /dev/null; then
        return
    fi
    rm -rf "$WORK/published" "$WORK/repacked"
    mkdir "$WORK/published" "$WORK/repacked"
    # The wheel is marked for CPython 3.10 only. Its code is pure Python and runs on all three.
    run_pip download --no-deps --only-binary=:all: --require-hashes \
        --python-version 3.10 --implementation cp --abi none --platform any \
        -d "$WORK/published" -r tools/detectron2_requirement.txt
    logged "$PY" tools/repack_detectron2.py "$WORK"/published/*.whl "$WORK/repacked"
    run_pip install --no-deps "$WORK"/repacked/*.whl
    rm -r "$WORK/published" "$WORK/repacked"
}

finish() {
    step 5 "checking that OpenCV finds its system libraries"
    replace_opencv_without_libraries
    step 6 "installing d2ft and importing it"
    # --no-deps: the requirements are there, and opencv-python must not come back on top of the
    # headless build, which pip does not count as the same thing.
    run_pip install --no-deps -e .
    logged "$PY" -c 'import torch, torchvision, cv2, detectron2.config, d2ft'
}

replace_opencv_without_libraries() {
    local reason library
    if reason=$("$PY" -c 'import cv2' 2>&1); then
        return
    fi
    library=$(printf '%s\n' "$reason" \
        | sed -n 's/.*ImportError: \(lib[^:]*\): cannot open shared object file.*/\1/p')
    if [ -z "$library" ]; then
        fail "$STEP failed:" "$reason"
    fi
    say "opencv-python needs the system library $library, which is not installed here." \
        "Replacing it by opencv-python-headless: the same cv2 without windows, which d2ft never opens."
    run_pip uninstall -y opencv-python
    run_pip install opencv-python-headless
    if ! reason=$("$PY" -c 'import cv2' 2>&1); then
        fail "$STEP failed with the headless build as well:" "$reason"
    fi
}

describe() {
    "$PY" - >&2 << 'PYTHON'
import importlib.metadata
import importlib.util
import platform

(detectron2,) = importlib.util.find_spec("detectron2").submodule_search_locations
torch = importlib.metadata.version("torch")
print(f"[d2ft set-up] ready: Python {platform.python_version()}, torch {torch}, {detectron2}")
PYTHON
    printf '%s\n' "$PY"
}

cd -- "$ROOT"
mkdir -p "$WORK"
ACTIVE=python3
if [ -n "${D2FT_PYTHON:-}" ]; then
    ACTIVE=$D2FT_PYTHON
    is_supported "$ACTIVE" || fail "D2FT_PYTHON=$ACTIVE does not run, or is not Python 3.10 to 3.12."
elif [ -n "${VIRTUAL_ENV:-}" ]; then
    ACTIVE=$VIRTUAL_ENV/bin/python
fi

if has_own_detectron2 "$ACTIVE"; then
    use_own_environment "$ACTIVE" "$@"
elif [ ! -e "$MADE_BY_US" ] && has_own_detectron2 "$VENV/bin/python"; then
    use_own_environment "$VENV/bin/python" "$@"
else
    use_venv "$@"
fi
describe
