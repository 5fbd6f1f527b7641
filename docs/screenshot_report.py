"""Photograph a report in a browser, wide and light, narrow and dark: docs/images/report*.png.

    make demo && python docs/screenshot_report.py demo-out

Needs Chromium or Chrome on PATH (Debian: apt-get install chromium).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Name, width and height in pixels, further switches.
VIEWS = (
    ("report", 1100, 1500, ()),
    # A window of the browser cannot be narrower.
    ("report-phone", 500, 1100, ("--blink-settings=preferredColorScheme=0",)),
)


def main(checkpoint: str) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"no browser on PATH; looked for {', '.join(BROWSERS)}")
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        subprocess.run([sys.executable, "-m", "fips_ext", "report", checkpoint, "--out", page], check=True)
        for name, width, height, switches in VIEWS:
            picture = FOLDER / f"{name}.png"
            command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
            command += [f"--user-data-dir={folder}/profile", f"--window-size={width},{height}", *switches]
            subprocess.run(
                [*command, f"--screenshot={picture}", page.as_uri()], check=True, capture_output=True
            )
            print(f"wrote {picture}")


if __name__ == "__main__":
    main(*sys.argv[1:])
