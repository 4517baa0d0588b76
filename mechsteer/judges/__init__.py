"""Judges: whether a text shows a behaviour, by words, by the pocket language's labeller, or by a model."""

from mechsteer.judges.agreement import agreement
from mechsteer.judges.judge import Judge
from mechsteer.judges.models import TEMPLATE, classifier_judge, yes_no_judge
from mechsteer.judges.words import NO_JUDGE, judge_of, lexicon_judge, mood_judge, telltale_words, topic_judge

__all__ = [
    "NO_JUDGE",
    "TEMPLATE",
    "Judge",
    "agreement",
    "classifier_judge",
    "judge_of",
    "lexicon_judge",
    "mood_judge",
    "telltale_words",
    "topic_judge",
    "yes_no_judge",
]
