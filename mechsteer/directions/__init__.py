"""Directions: what they are, how they are found in texts and weights, and the files that others read."""

from mechsteer.directions.direction import Direction, cosine_table
from mechsteer.directions.extraction import difference_of_means, from_unembedding, pca
from mechsteer.directions.gguf import export_gguf, import_gguf

__all__ = [
    "Direction",
    "cosine_table",
    "difference_of_means",
    "export_gguf",
    "from_unembedding",
    "import_gguf",
    "pca",
]
