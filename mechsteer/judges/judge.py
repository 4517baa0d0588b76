"""What a judge is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float

from mechsteer import markup
from mechsteer.errors import MechsteerError

Probabilities = Callable[[Sequence[str]], Sequence[float] | np.ndarray]


@dataclass(frozen=True)
class Judge:
    """Says of texts whether they show a behaviour.

        judge = judge_of("Talk only about cats.")
        judge("The kittens purr."), judge.shown                     # True, "are about cats"
        judge.many(texts)                                           # all at once, which is fast where it is a model

    Attributes:
        name: what it goes by, in one phrase.
        shown: what texts that show the behaviour do, for sentences: "are about cats".
        words: words and phrases to mark where texts are shown.
        of: the probability, for each of several texts, that it shows the behaviour; 0 or 1 where words decide.
        threshold: the probability from which on a text counts as showing it.

    Raises:
        MechsteerError: the threshold is no probability.
    """

    name: str
    shown: str
    words: tuple[str, ...] = field(repr=False)
    of: Probabilities = field(repr=False)
    threshold: float | int = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise MechsteerError(f"The judge's threshold is {self.threshold}. Pass a probability above 0, such as 0.5.")

    @staticmethod
    def by_test(name: str, shown: str, words: tuple[str, ...], test: Callable[[str], bool]) -> "Judge":
        """A judge that looks at one text at a time and is always sure."""
        return Judge(name, shown, words, lambda texts: [float(test(text)) for text in texts])

    def _repr_html_(self) -> str:
        words = ", ".join(self.words[:12]) + (", ..." if len(self.words) > 12 else "")
        rows = {"shows": f"texts that {self.shown}", "from a probability of": f"{self.threshold:g}", "words": words}
        return markup.card("Judge", markup.facts(rows), about=self.name)

    def __call__(self, text: str) -> bool:
        return bool(self.many([text])[0])

    def many(self, texts: Sequence[str]) -> Bool[np.ndarray, " text"]:
        """Whether each text shows the behaviour.

        Raises:
            MechsteerError: `texts` is one string; or a model that judges cannot read a text.
        """
        return self.probabilities(texts) >= self.threshold

    def probabilities(self, texts: Sequence[str]) -> Float[np.ndarray, " text"]:
        """How likely each text shows the behaviour. Texts that occur several times are judged once.

        Raises:
            MechsteerError: `texts` is one string; or a model that judges cannot read a text.
        """
        if isinstance(texts, str):
            raise MechsteerError("A judge got one string where several texts were expected. Pass a list of texts.")
        place = {text: index for index, text in enumerate(dict.fromkeys(texts))}
        values = np.asarray(self.of(list(place)) if place else [], dtype=np.float64)
        return values[[place[text] for text in texts]]
