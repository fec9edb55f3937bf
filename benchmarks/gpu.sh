#!/usr/bin/env bash
# Everything that wants a GPU, in at most 12 minutes on one: tests/gpu, step, loader, balancing, memory.
#
#   benchmarks/fetch_wheels.sh WHEELS           where there is a network: all that torch and torchvision lack
#   benchmarks/gpu.sh [--tiny] [OUT [WHEELS]]   on the GPU's machine, which needs no network
#
# OUT (gpu-results) then holds gpu.json and gpu.md. WHEELS (gpu-wheels) is installed into OUT/site and nowhere
# else; without that folder the script takes what python3 (or $PYTHON) has. A trial without a GPU:
#
#   MTL_BENCH_DEVICE=cpu benchmarks/gpu.sh --tiny
set -euo pipefail
cd "$(dirname "$0")/.."

tiny=()
if [ "${1:-}" = --tiny ]; then
    tiny=(--tiny)
    shift
fi
out=$(realpath -m "${1:-gpu-results}")
wheels=${2:-gpu-wheels}
python=${PYTHON:-python3}

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if compgen -G "$wheels/*.whl" > /dev/null; then
    rm -rf "$out/site"
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
        --target "$out/site" "$wheels"/*.whl
    # A run writes down the versions of what the package requires, which its metadata says.
    "$python" -c 'import setuptools; setuptools.setup()' --quiet egg_info --egg-base "$out/site"
    export PYTHONPATH="$PWD:$out/site${PYTHONPATH:+:$PYTHONPATH}"
fi
exec "$python" -m benchmarks gpu "$out" "${tiny[@]}"
