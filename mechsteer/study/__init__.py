"""The main job: what one prefix does to one model, where it enters, and what else does the same, as one report.

from mechsteer.study import study

cats = study("Talk only about cats.", out="study-cats")
cats.report, cats.results, cats.summary
"""

import lazy_loader

# The public names stand in `__init__.pyi`. They are imported when first used, so that a chapter can import its
# neighbours while the runner imports the chapters.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
