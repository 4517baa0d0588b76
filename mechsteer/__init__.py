"""mechsteer: what it takes to move a language model's behaviour, measured on TransformerLens hook points."""

from importlib.metadata import version

import lazy_loader

__version__ = version("mechsteer")

# The public names stand in `__init__.pyi`, once, and are imported when first used: `import mechsteer` and
# `mechsteer --help` need neither torch nor TransformerLens.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
