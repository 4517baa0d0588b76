"""Interventions: what is done to an activation, where, and how strongly. Frozen values, all of one kind."""

from mechsteer.interventions.ablate import Ablate
from mechsteer.interventions.features import SetFeature
from mechsteer.interventions.replace import Replace
from mechsteer.interventions.steering import Add, Scale, SoftPrefix

__all__ = ["Ablate", "Add", "Replace", "Scale", "SetFeature", "SoftPrefix"]
