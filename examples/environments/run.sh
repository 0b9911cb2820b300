#!/usr/bin/env bash
# Makes two environments whose packages conflict, starts a worker in each, and runs one step that uses both.
#   ./run.sh [PACKAGE]    installs PACKAGE as rewardq: this checkout unless given
# PYTHON names the interpreter (3.11 to 3.13), REWARDQ_BROKER_URL the Redis.
set -euo pipefail
cd "$(dirname "$0")"

make_environment() {
    [ -x ".venvs/$1/bin/rewardq" ] && return
    "${PYTHON:-python3}" -m venv ".venvs/$1"
    ".venvs/$1/bin/pip" install --quiet --disable-pip-version-check "$package" "$2"
}

package=${1:-../..}
make_environment old 'webcolors<24'
make_environment new 'webcolors>=24.8'

REWARDQ_MODULES=old_colours .venvs/old/bin/rewardq worker -Q old_colours &
workers=$!
REWARDQ_MODULES=new_colours .venvs/new/bin/rewardq worker -Q new_colours &
workers="$workers $!"
trap 'kill $workers; wait' EXIT

.venvs/new/bin/python score.py   # a trainer needs only rewardq, so any of the environments will do
