#!/usr/bin/env bash
# Make the environment if need be, then run the tests.
#
#   bash tools/run_tests.sh [--ci | --all] [arguments of pytest]
#
# Without an option: the fast suite. --ci adds the slow tests that CI runs as well, --all every slow
# test. Tests that need a GPU or the network are chosen by hand: bash tools/run_tests.sh -m gpu
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

selection=()
case ${1:-} in
    --ci) selection=(-m "not gpu and not network and (not slow or ci)") && shift ;;
    --all) selection=(-m "not gpu and not network") && shift ;;
esac

python=$(bash tools/setup_env.sh dev)

# A process takes about 1 GB, and one thread: more threads than cores wait for one another.
parallel=(-n auto --maxprocesses 8)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# The form of the array: bash before 4.4 takes an empty one for an unset variable.
exec "$python" -m pytest "${parallel[@]}" ${selection[@]+"${selection[@]}"} "$@"
