"""Context parallelism without Transformer Engine: ranks that share each sequence.

`TorchDotProductAttention` is the core attention that Megatron-Core's layers are built of;
`context_parallel_attention` is the same as a function.
"""

from mcore_lab.backends.context_parallel.attention import TorchDotProductAttention
from mcore_lab.backends.context_parallel.functional import COMM_TYPES, context_parallel_attention
from mcore_lab.backends.context_parallel.zigzag import Documents, zigzag_places

__all__ = [
    "COMM_TYPES",
    "Documents",
    "TorchDotProductAttention",
    "context_parallel_attention",
    "zigzag_places",
]
