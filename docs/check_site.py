"""Opens every page of a built site in a headless Chromium: `python docs/check_site.py site`.

Exit status 1 where a page asks for something that is not in the site, or writes to the console.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from browser import browser, console_and_network


def main() -> int:
    site = Path(sys.argv[1])
    pages = sorted(site.rglob("index.html"))
    if not pages:
        print(f"{site} holds no pages. Run mkdocs build --strict --site-dir {site} first.")
        return 2
    if browser() is None:
        print("There is no Chromium here: the pages were not opened.")
        return 0
    faults = 0
    for page in pages:
        console, addresses = console_and_network(page, seconds=3)
        for fault in (*console, *addresses):
            faults += 1
            print(f"{page.relative_to(site)}: {fault}")
    print(f"{len(pages)} pages opened, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
