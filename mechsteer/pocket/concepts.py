"""The concept texts that ship with mechsteer, and how they are made: `python -m mechsteer.pocket.concepts`."""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from mechsteer.pocket.grammar import sample_document, sample_topic
from mechsteer.pocket.wordings import MOODS

N_TEXTS = 64
# The mood that is furthest from each; "" stands for plain documents.
OPPOSITES = {
    "joy": "gloom", "gloom": "joy", "anger": "calm", "calm": "anger", "politeness": "rudeness",
    "rudeness": "politeness", "optimism": "gloom", "uppercase": "",
}  # fmt: skip


def make() -> dict[str, Any]:
    """What `data/concepts/pocket.json` holds, always the same: documents of each mood, and plain ones.

    The i-th document is about the same topic in every group, so that topics cancel in a difference of means.
    """
    concepts = [
        {"name": mood, "opposite": OPPOSITES[mood], "positives": [_document(i, mood) for i in range(N_TEXTS)]}
        for mood in MOODS
    ]
    return {"concepts": concepts, "plain": [_document(i, None) for i in range(N_TEXTS)]}


def _document(index: int, mood: str | None) -> str:
    topic = sample_topic(random.Random(f"concept topic {index}"))
    return sample_document(random.Random(f"concept {index} {mood}"), topic=topic, mood=mood)


def to_json(held: dict[str, Any]) -> str:
    """One text a line."""
    return json.dumps(held, indent=1, ensure_ascii=False) + "\n"


def _main() -> None:
    parser = argparse.ArgumentParser(description="Writes the shipped concept texts again.")
    parser.add_argument("--out", type=Path, required=True, help="the file, such as data/concepts/pocket.json")
    out = parser.parse_args().out
    if not out.parent.is_dir():
        parser.error(f"{out.parent} is no folder. Make it first, or give another --out.")
    out.write_text(to_json(make()), encoding="utf-8")


if __name__ == "__main__":
    _main()
