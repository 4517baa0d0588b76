"""Objectives: one number per prompt from a run, which say beforehand what they read."""

from mechsteer.objectives.base import Objective, Sum
from mechsteer.objectives.features import FeatureActivation
from mechsteer.objectives.logits import KLFromBaseline, LogitGap, TeacherForcedCE, TokenProb
from mechsteer.objectives.states import Projection, StateMatch
from mechsteer.objectives.tokens import Tokens, TokenSet

__all__ = [
    "FeatureActivation",
    "KLFromBaseline",
    "LogitGap",
    "Objective",
    "Projection",
    "StateMatch",
    "Sum",
    "TeacherForcedCE",
    "TokenProb",
    "TokenSet",
    "Tokens",
]
