#!/usr/bin/env bash
# Make the environment if need be, then fine-tune, evaluate and draw, with nothing at hand.
#
#   bash tools/quickstart.sh [KEY VALUE ...]
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

python=$(bash tools/setup_env.sh)
exec "$python" -W ignore tools/quickstart.py "$@"
