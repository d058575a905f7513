#!/bin/sh
# Make the lock files again from pyproject.toml, with the newest versions that it admits:
#
#   pip install uv && docker/lock/make.sh
#
# They are for Python 3.12 on Linux, x86_64 and aarch64. Commit the four files together.
set -eu
cd "$(dirname "$0")/../.."
scratch=$(mktemp -d)
trap 'rm -r "$scratch"' EXIT

lock() { # lock FILE ARGUMENT...: uv's lock of the arguments
    file=$1
    shift
    uv pip compile --quiet --upgrade --python-version 3.12 --universal --generate-hashes \
        --no-emit-index-url --no-header --output-file "$file" "$@"
}

# torch and the CUDA packages that PyPI's build of it needs are apart: a CPU build needs none.
lock "$scratch/all.txt" pyproject.toml --extra plot --extra track
awk -v torch="$scratch/torch.txt" -v rest="$scratch/cpu.txt" \
    '/^[a-z]/ {file = /^(torch|cuda-|nvidia-)/ ? torch : rest} {print > file}' "$scratch/all.txt"

# The GPU image's base brings these, in NVIDIA's builds; what torch needs comes with it.
for package in torch triton numpy; do
    echo "$package; python_version < '3'"
done > "$scratch/of_the_base.txt"
lock "$scratch/gpu.txt" pyproject.toml --extra plot --extra track \
    --override "$scratch/of_the_base.txt"

echo hatchling | lock "$scratch/build.txt" -
mv "$scratch/cpu.txt" "$scratch/torch.txt" "$scratch/gpu.txt" "$scratch/build.txt" docker/lock/
