"""Recording activations of more tokens than memory holds: shards on disk, and statistics as they go by."""

from mechsteer.recording.reader import Recording, TokenRows, TopK
from mechsteer.recording.recorder import record_stream

__all__ = ["Recording", "TokenRows", "TopK", "record_stream"]
