"""The same push as text: soft prefixes, projection to tokens, and discrete search under constraints."""

from mechsteer.prefix.constraints import Constraints
from mechsteer.prefix.evaluation import evaluate_prefixes
from mechsteer.prefix.found import FoundPrefix
from mechsteer.prefix.match import MatchedPrefix, match_prefix
from mechsteer.prefix.projection import Hardened, decode_beam, project, replace_tokens
from mechsteer.prefix.round_trip import RoundTrip
from mechsteer.prefix.search import search_prefix
from mechsteer.prefix.soft import FoundSoft, optimise_soft_prefix

__all__ = [
    "Constraints",
    "FoundPrefix",
    "FoundSoft",
    "Hardened",
    "MatchedPrefix",
    "RoundTrip",
    "decode_beam",
    "evaluate_prefixes",
    "match_prefix",
    "optimise_soft_prefix",
    "project",
    "replace_tokens",
    "search_prefix",
]
