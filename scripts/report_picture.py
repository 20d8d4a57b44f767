#!/usr/bin/env python3
"""Takes the README's pictures of a report, light and dark, with the Chromium that is installed:

python scripts/report_picture.py RUN_FOLDER
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
SIZE = (1040, 700)  # the first screen
SCHEMES = {"light": 1, "dark": 0}  # Chromium's numbers


def main(folder: str) -> None:
    """Both pictures. Raises CalledProcessError where the browser fails."""
    page = (Path(folder) / "report.html").resolve().as_uri()
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))))
    for name, number in SCHEMES.items():
        with tempfile.TemporaryDirectory() as profile:
            subprocess.run(
                [
                    browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                    f"--user-data-dir={profile}", f"--window-size={SIZE[0]},{SIZE[1]}",
                    f"--blink-settings=preferredColorScheme={number}",
                    f"--screenshot={FIGURES / f'report-{name}.png'}", page,
                ],
                check=True,
                capture_output=True,
            )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
