"""Says how it was started."""

import json
import sys

import torch

print(
    json.dumps(
        {
            "argv": sys.argv,
            "name": __name__,
            "path": sys.path[0],
            "device": str(torch.ones(1, device="cuda").device),
        }
    )
)
