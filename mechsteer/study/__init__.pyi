"""The public names and where they live; read by type checkers, by editors, and when one is first used."""

from .chapter import Chapter as Chapter
from .chapter import Findings as Findings
from .runner import Study as Study
from .runner import load as load
from .runner import study as study
from .settings import Request as Request
from .settings import Settings as Settings
from .settings import as_requests as as_requests
