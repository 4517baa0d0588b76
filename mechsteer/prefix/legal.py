"""Which prefixes a search may try, and which it may return: constraints and survival as text, together."""

from collections.abc import Sequence
from dataclasses import replace

from mechsteer.model import Model
from mechsteer.prefix.constraints import Constraints
from mechsteer.prefix.round_trip import Placed, RoundTrip
from mechsteer.prompts import Prompts

Ids = tuple[int, ...]


class Legal:
    """Says of prefixes whether they keep to constraints and survive as text.

    Attributes:
        keep: the constraints.
        trip: decodes and encodes in the prompts.
        allowed: ids of the tokens that violate nothing by themselves, ascending.
    """

    def __init__(self, model: Model, prompts: Prompts, keep: Constraints) -> None:
        """
        Raises:
            MechsteerError: no token is allowed.
        """
        self.keep, self.trip = keep, RoundTrip(prompts)
        self.allowed: list[int] = keep.allowed(model)
        self._allowed = set(self.allowed)
        # A beginning may still become long and unlike the reference.
        self._beginning = replace(keep, min_tokens=None, min_edit_distance=0)

    def valid(self, prefixes: Sequence[Ids]) -> list[bool]:
        """Whether each survives between its nearest tokens and keeps to the constraints: what a search can afford."""
        return self._near(prefixes, self.keep)

    def begins(self, prefixes: Sequence[Ids]) -> list[bool]:
        """The same for beginnings of prefixes."""
        return self._near(prefixes, self._beginning)

    def approved(self, ids: Ids) -> bool:
        """Whether a prefix survives, and keeps to the constraints, in every whole prompt."""
        return self._allowed.issuperset(ids) and all(self._fine(ids, each, self.keep) for each in self.trip.placed(ids))

    def _near(self, prefixes: Sequence[Ids], keep: Constraints) -> list[bool]:
        if not prefixes:
            return []
        return [self._fine(ids, each, keep) for ids, each in zip(prefixes, self.trip.near(prefixes), strict=True)]

    def _fine(self, ids: Ids, placed: Placed, keep: Constraints) -> bool:
        text = None if self.trip.tokenizer is None else placed.text
        return placed.survives and keep.violation(ids, text, before=placed.before, after=placed.after) is None
