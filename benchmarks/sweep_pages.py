"""Pictures of a sweep's report, of what it drew, and of its study in Optuna's dashboard, for README and guide:
`python benchmarks/sweep_pages.py FOLDER`.

FOLDER is that of a finished sweep, such as `runs/sweeps/learning_rate`. Needs Chromium and `ray-sd[sweep]`.
"""

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from PIL import Image, ImageChops

IMAGES = Path(__file__).parents[1] / "docs" / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
REPORT_SIZE = (1400, 3000)
PICTURES_SIZE = (1400, 800)
ALONE = "<style>header, nav, section:not(#pictures) { display: none; }</style>"
"""Leaves of a report the pictures."""
DASHBOARD_SIZE = (1400, 1000)
MARGIN = 20
"""Pixels below the last that is not empty."""
PATIENCE_SECONDS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a finished sweep")
    folder = parser.parse_args().folder.resolve()
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit("error: Chromium is not on the PATH; apt-get install chromium")
    photograph(browser, (folder / "report.html").as_uri(), REPORT_SIZE, IMAGES / "sweep_report.png")
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch) / "pictures.html"
        page.write_text((folder / "report.html").read_text("utf-8") + ALONE, "utf-8")
        photograph(browser, page.as_uri(), PICTURES_SIZE, IMAGES / "sweep_pictures.png")
    port = free_port()
    study = f"sqlite:///{folder / 'optuna.db'}"
    command = [Path(sys.executable).with_name("optuna-dashboard"), study, "--artifact-dir", folder / "artifacts"]
    dashboard = subprocess.Popen([*command, "--port", str(port)])
    try:
        address = f"http://127.0.0.1:{port}/dashboard/studies/1"
        wait_for(address)
        photograph(browser, address, DASHBOARD_SIZE, IMAGES / "sweep_dashboard.png")
    finally:
        dashboard.terminate()
        dashboard.wait()


def photograph(browser: str, address: str, size: tuple[int, int], path: Path) -> None:
    """A page as it shows itself, without what is empty below, in few colours."""
    with tempfile.TemporaryDirectory() as scratch:
        shot = Path(scratch) / "page.png"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader", "--hide-scrollbars"]
        options += [f"--window-size={size[0]},{size[1]}", "--virtual-time-budget=20000", f"--screenshot={shot}"]
        subprocess.run([browser, *options, address], check=True, stderr=subprocess.DEVNULL)
        picture = Image.open(shot).convert("RGB")
        ground = Image.new("RGB", picture.size, picture.getpixel((picture.width - 1, picture.height - 1)))
        shown = ImageChops.difference(picture, ground).getbbox()
        if shown is None:
            sys.exit(f"error: {address} shows nothing")
        picture.crop((0, 0, picture.width, min(shown[3] + MARGIN, picture.height))).quantize(256).save(
            path, optimize=True
        )
    print(path)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(address: str) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            urlopen(address).close()
            return
        except URLError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


if __name__ == "__main__":
    main()
