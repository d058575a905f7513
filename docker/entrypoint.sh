#!/bin/sh
# Run the command given, under whatever user id the container was started with.
set -eu

# An id that the image does not know has no home folder and no name; torch asks for both.
[ -w "${HOME:-/}" ] || export HOME=/tmp
export USER="${USER:-lab}"

if [ ! -w /runs ]; then
    echo "warning: user $(id -u) can't write to /runs; start the container with --user" \
        "$(stat -c %u:%g /runs), which owns what is mounted there" >&2
fi

# NVIDIA's images say here what they are, and what of the machine won't do.
if [ -x /opt/nvidia/nvidia_entrypoint.sh ]; then
    exec /opt/nvidia/nvidia_entrypoint.sh "$@"
fi
exec "$@"
