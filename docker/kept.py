"""Print the packages of an NGC PyTorch image that an install must keep, as pip's constraints.

These are torch, Transformer Engine, and what is compiled against them or they against: NVIDIA's
builds, which no index has.
"""

import re
import sys
from importlib.metadata import distributions

NEEDED = ("torch", "transformer-engine")
KEPT = re.compile(
    r"torch|torchvision|torchaudio|torchao|torch-tensorrt|transformer-engine.*"
    r"|triton|pytorch-triton|apex|flash-attn.*|numpy|cuda-.*|nvidia-.*"
)


def kept() -> dict[str, str]:
    """Return name and version of what this Python sees and an install must keep."""
    seen: dict[str, str] = {}
    for distribution in distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        if KEPT.fullmatch(name):
            seen.setdefault(name, distribution.version)  # the first on sys.path is what is imported
    return seen


if __name__ == "__main__":
    packages = kept()
    if missing := [name for name in NEEDED if name not in packages]:
        sys.exit(f"the base image has no {' and no '.join(missing)}: is it an NGC PyTorch image?")
    for name, version in sorted(packages.items()):
        print(f"{name}=={version}")
