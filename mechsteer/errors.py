"""The exceptions that mechsteer raises on purpose.

Every message is one line that says what was passed, what was expected and what to do. They are `ValueError`s, so that
code which does not know mechsteer can still catch them; the command line turns them into exit status 2.
"""


class MechsteerError(ValueError):
    """Something that was asked for cannot be done as asked; the message says what to change."""


class ModelLoadError(MechsteerError):
    """A model could not be loaded, or would have been loaded wrongly."""
