"""How the numbers of the shipped chapters are made again: read from a study's folder, and measured anew.

A module for each chapter holds, by name, a title and two pieces of Python that run as they are and end in what was
found: `study` is the loaded study, and `case` its model, requests and options. Both give the same numbers.
"""

from importlib import import_module
from textwrap import dedent

from mechsteer.study.blocks import Source


def source(chapter: str, name: str, **values: object) -> Source:
    """How something in a chapter is made again.

    Args:
        chapter: its name.
        name: of the source, which also names the place in the report.
        values: fill "{...}" in the code, where it depends on what was found.
    """
    title, load, measure = import_module(f"{__name__}.{chapter}").SOURCES[name]
    load, measure = dedent(load).strip(), dedent(measure).strip()
    for key, value in values.items():
        load, measure = (code.replace(f"{{{key}}}", str(value)) for code in (load, measure))
    return Source(name, title, load, measure)
