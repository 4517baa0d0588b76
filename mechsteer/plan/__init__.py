"""What work will take before it is done: operations, bytes, memory, wall time and device-hours, without a model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
