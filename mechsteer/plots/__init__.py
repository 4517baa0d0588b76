"""Draws: a Result with plotly, tokens and attention with CircuitsVis. Nothing else in mechsteer draws.

No picture asks for anything from a network.
"""

from mechsteer.plots.figures import draw
from mechsteer.plots.labels import plain
from mechsteer.plots.themes import DARK, LIGHT, PAPER, captioned, theme
from mechsteer.plots.views import View, attention, bundle, tokens

__all__ = ["DARK", "LIGHT", "PAPER", "View", "attention", "bundle", "captioned", "draw", "plain", "theme", "tokens"]
