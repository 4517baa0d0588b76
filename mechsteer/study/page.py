"""Figures on one page that needs no network."""

from collections.abc import Sequence

import plotly.graph_objects as go
from markupsafe import Markup

_STYLE = """body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 1rem system-ui, sans-serif }
body { color: #1f2328 }
h1 { font-size: 1.4rem }
p { white-space: pre-line; overflow-wrap: anywhere }"""


def page(title: str, lead: str | Markup, figures: Sequence[go.Figure]) -> str:
    """HTML with a title, a paragraph and the figures.

    Args:
        title: as plain text; it is escaped.
        lead: the paragraph, as plain text, or Markup where it holds elements.
        figures: texts from a model or a user in them went through `mechsteer.plots.plain`.
    """
    drawn = [
        figure.to_html(full_html=False, include_plotlyjs=not place, config={"displaylogo": False, "responsive": True})
        for place, figure in enumerate(figures)
    ]
    head = Markup("<h1>{}</h1>\n<p>{}</p>").format(title, lead)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{Markup.escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>{head}\n{''.join(drawn)}</body></html>\n"
    )
