#!/usr/bin/env bash
# The wheels that a machine with PyTorch (torch, torchvision, numpy, pillow) lacks to run benchmarks/gpu.sh.
#
#   benchmarks/fetch_wheels.sh [WHEELS [PYTHON_VERSION]]        gpu-wheels, 3.12
#
# Versions are those of the environment whose python3 (or $PYTHON) this runs with (`make install` and the dev
# extra); what has no wheel on the registry (DeepSpeed, without its CUDA kernels) is built here.
set -euo pipefail
cd "$(dirname "$0")/.."

wheels=${1:-gpu-wheels}
version=${2:-3.12}
python=${PYTHON:-python3}
limit_mib=60
built="deepspeed"

mkdir -p "$wheels"
rm -f "$wheels"/*.whl
pins=$("$python" - "$version" <<'PYTHON'
"""The pinned closure of setup.cfg's requirements, and of the tests' tools, less what comes with PyTorch."""

import sys
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYTORCH = {"torch", "torchvision", "numpy", "pillow", "triton", "setuptools"}
TOOLS = ["hypothesis", "pytest", "pytest-timeout", "pytest-xdist", "simplejpeg", "torchjd", "turbojpeg"]
environment = {"python_version": sys.argv[1], "python_full_version": f"{sys.argv[1]}.0"}

settings = ConfigParser()
settings.read("setup.cfg")
left = [*settings["options"]["install_requires"].split("\n"), *TOOLS]
pins = {}
while left:
    line = left.pop().strip()
    if not line:
        continue
    requirement = Requirement(line)
    name = canonicalize_name(requirement.name)
    wanted = requirement.marker is None or any(
        requirement.marker.evaluate(environment | {"extra": extra}) for extra in ("", *requirement.extras)
    )
    if not wanted or name in pins or name in PYTORCH:
        continue
    try:
        pins[name] = version(name)
    except PackageNotFoundError:
        sys.exit(f"{name}: expected it to be installed in {sys.prefix}, found it missing. Install the dev extra.")
    left += requires(name) or []
print("\n".join(f"{name}=={pin}" for name, pin in sorted(pins.items())))
PYTHON
)

platforms=()
for name in manylinux_2_{28,27,24,17,12,5}_x86_64 manylinux{2014,2010,1}_x86_64; do
    platforms+=(--platform "$name")
done
grep -v "^$built==" <<< "$pins" > "$wheels/pins.txt"
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version "$version" --implementation cp "${platforms[@]}" --dest "$wheels" --requirement "$wheels/pins.txt"
DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
    --wheel-dir "$wheels" "$(grep "^$built==" <<< "$pins")"
rm "$wheels/pins.txt"

kib=$(du -ck "$wheels"/*.whl | tail -1 | cut -f1)
echo "$(ls "$wheels" | wc -l) wheels, $((kib / 1024)) MiB, in $wheels"
if [ "$kib" -gt $((limit_mib * 1024)) ]; then
    echo "$wheels: expected at most $limit_mib MiB, found $((kib / 1024)). Leave something out." >&2
    exit 1
fi
