"""Types of the public names: pyright must know every one of them completely. Exit status 1 if it does not.

The names are those of `tests/public_api.py`, with the members of the classes among them. `pyright --verifytypes` counts
all modules; how many of their symbols are complete may not fall either.
"""

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import public_api

LEAST = 96.0  # percent of all symbols, internal ones too


def main() -> int:
    run = subprocess.run(
        ["pyright", "--verifytypes", "mechsteer", "--ignoreexternal", "--outputjson"], capture_output=True, text=True
    )
    try:
        found = json.loads(run.stdout)["typeCompleteness"]
    except (json.JSONDecodeError, KeyError):
        print(run.stdout, run.stderr, file=sys.stderr)
        return 1
    public = public_api.paths()
    # The members of a class have its path before theirs.
    symbols = [s for s in found["symbols"] if any(".".join(s["name"].split(".")[:n]) in public for n in range(2, 7))]
    incomplete = [s for s in symbols if not s["isTypeKnown"] or s["isTypeAmbiguous"]]
    for symbol in incomplete:
        for each in symbol["diagnostics"]:
            if each["severity"] == "error":
                print(f"{symbol['name']}: {each['message']}")
    score = 100 * found["completenessScore"]
    print(
        f"{len(symbols) - len(incomplete)} of {len(symbols)} public symbols have complete types; {score:.1f} % of all."
    )
    if score < LEAST:
        print(f"At least {LEAST} % of all must have: pyright --verifytypes mechsteer --ignoreexternal names the rest.")
    return int(bool(incomplete) or not symbols or score < LEAST)


if __name__ == "__main__":
    sys.exit(main())
