#!/usr/bin/env bash
# Install a wheel into a fresh environment outside the checkout and run the built-in recipe from it.
#   scripts/try_wheel.sh PYTHON WHEEL
set -euo pipefail
python=$1
wheel=$(realpath "$2")
constraints=$(realpath "$(dirname "$0")/../constraints.txt")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check -c "$constraints" "$wheel"
cd "$folder"
venv/bin/python -c 'import finetune, sys; sys.exit(not finetune.__file__.startswith(sys.prefix))' ||
  { echo "the package was not imported from the wheel" >&2; exit 1; }
venv/bin/finetune run tiny-pydoc
venv/bin/finetune show tiny-pydoc --verify
