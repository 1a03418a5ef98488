#!/bin/sh
# install.sh PYTHON SGLANG VENV [BASE]: builds VENV with the CPU engine of SGLang version SGLANG.
# With BASE, a ready environment of another version, VENV has only what the two pin differently and takes the rest from it.
set -eu
python=$1 version=$2 venv=$3 base=${4:-}
here=$(dirname "$0")
pins=$here/sglang-$version.txt
pip() { "$venv/bin/python" -m pip install -q --disable-pip-version-check --no-compile -c "$here/constraints.txt" "$@"; }

if [ -n "$base" ] && [ -f "$base/.ready" ]; then
  [ -x "$venv/bin/python" ] || "$base/bin/python" -m venv --without-pip "$venv"
  site() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
  # A plain path: what VENV has of its own comes first; pip is among the rest. The base's editable installs are not seen.
  site "$base" > "$(site "$venv")/base.pth"
  pip --no-deps -r "$pins"
else
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  pip "setuptools>=77,<82" wheel
  pip torch==2.13.0
  pip -c "$pins" -r "$here/cpu.txt" -r "$here/dev.txt"
  pip --no-deps -c "$pins" -r "$here/cpu-nodeps.txt"
fi
# On all cores, which pip does not use; a few packages carry files that do not compile.
"$venv/bin/python" -m compileall -qq -j 0 "$venv/lib" || true
