"""Headless Chromium, driven through a pipe by its DevTools protocol."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PATIENCE_SECONDS = 30
POLL = """
new Promise((go, stop) => {{
  const end = Date.now() + 1000 * {seconds};
  const ask = () => ({ready})() ? go() : Date.now() > end ? stop(Error("not within {seconds} s")) : setTimeout(ask, 20);
  ask();
}})
"""


class Browser:
    """One tab of one browser. What its page's scripts complain of is in `complaints`."""

    def __init__(self, chromium: str, profile: Path) -> None:
        self.complaints: list[str] = []
        self._asked = 0
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader", "--hide-scrollbars"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={profile}"]
        # Chromium takes commands from file 3 and answers to file 4, wherever these two are here.
        script = f'exec "$@" 3<&{commands} 4>&{answers}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", chromium, *options, "about:blank"],
            pass_fds=(commands, answers),
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._reader = os.fdopen(self._answers, "rb")
        self._buffer = b""
        self._session = ""
        pages = [one for one in self._ask("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        attached = self._ask("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime"):
            self._ask(f"{domain}.enable")

    def close(self) -> None:
        os.close(self._commands)  # upon which it ends
        self._process.wait(PATIENCE_SECONDS)
        self._reader.close()

    def show(
        self, page: Path, *, width: int = 1400, height: int = 1000, dark: bool = False, keep: bool = False
    ) -> None:
        """Open a report, at a size and in a theme, and wait for its charts. keep: what was chosen in it before."""
        self._ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[theme])
        if not keep:
            self.run("try { sessionStorage.clear(); } catch {}")
        self._ask("Page.navigate", url="about:blank")
        self.complaints.clear()
        self._ask("Page.navigate", url=page.as_uri())
        self.wait("() => location.protocol === 'file:' && document.readyState === 'complete'")
        self.wait(
            "() => [...document.querySelectorAll('.chart')].every((chart) => chart.querySelector('.main-svg, p'))"
        )

    def run(self, expression: str) -> Any:
        """What a JavaScript expression comes to."""
        told = self._ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def wait(self, ready: str) -> None:
        """Until a JavaScript function returns true."""
        self.run(POLL.format(ready=ready, seconds=PATIENCE_SECONDS))

    def press(self, key: str) -> None:
        codes = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Escape": 27, "Enter": 13, "Tab": 9}
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self._ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key], **text)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """With the left button of a mouse, in steps, as a hand does."""
        self._mouse("mouseMoved", *start)
        self._mouse("mousePressed", *start)
        for part in (0.25, 0.5, 0.75, 1):
            self._mouse("mouseMoved", *(a + part * (b - a) for a, b in zip(start, end, strict=True)))
        self._mouse("mouseReleased", *end)

    def picture(self) -> bytes:
        """The whole page as a PNG."""
        size = self._ask("Page.getLayoutMetrics")["cssContentSize"]
        shot = self._ask("Page.captureScreenshot", captureBeyondViewport=True, clip=size | {"scale": 1})
        return base64.b64decode(shot["data"])

    def _mouse(self, kind: str, x: float, y: float) -> None:
        self._ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._asked += 1
        told: dict[str, Any] = {"id": self._asked, "method": method, "params": parameters}
        if self._session:
            told["sessionId"] = self._session
        os.write(self._commands, json.dumps(told).encode() + b"\0")
        while True:
            message = self._next()
            if message.get("method") == "Runtime.exceptionThrown":
                details = message["params"]["exceptionDetails"]
                self.complaints.append(details.get("exception", {}).get("description", details["text"]))
            if message.get("method") == "Runtime.consoleAPICalled" and message["params"]["type"] == "error":
                self.complaints.append(str(message["params"]["args"]))
            if message.get("id") == self._asked:
                assert "error" not in message, message
                return message["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            read = self._reader.read1(2**20)
            assert read, "Chromium ended"
            self._buffer += read
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("chromium is not on the PATH; apt-get install chromium")
    opened = Browser(chromium, profile)
    try:
        yield opened
    finally:
        opened.close()
