"""What a model is trained on: datasets, and batches drawn by global index.

The package itself knows text files only and imports no torch; `datasets` and `batches` are modules
of it.
"""

from mcore_lab.data.files import text_files

__all__ = ["text_files"]
