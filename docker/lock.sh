#!/usr/bin/env bash
# Writes docker/locks anew: for each image the packages that it installs, each with its version and its hashes.
# Needs uv (pip install uv). Versions that are locked stay, unless --upgrade is given:
#
#   docker/lock.sh
#   docker/lock.sh --upgrade
#   docker/lock.sh --upgrade-package pillow
set -euo pipefail
cd "$(dirname "$0")/.."

lock() {
  local role=$1
  shift
  # setuptools builds rewardq itself, without a download of its own.
  echo "setuptools>=77" | uv pip compile pyproject.toml - "$@" --universal --python-version 3.11 \
    --generate-hashes --no-header --no-annotate --no-emit-index-url --quiet --output-file "docker/locks/$role.txt" \
    "${options[@]}"
}

options=("$@")
lock gpu --extra gpu --extra ocr
lock vlm --extra judge --extra remote
lock flower --extra dashboard
