"""Debian's chromium, headless, asked about a page over its debugging pipe. No package needed.

Run as a script it takes the pictures of the page in docs/images.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
Scheme = Literal["light", "dark"]


class Browser:
    """One tab. ``complaints``: what the console and the browser's log said since ``open``."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive = send, receive
        self._count, self._rest, self._session = 0, b"", ""
        self.complaints: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def open(self, file: Path, width: int, scheme: Scheme = "light", scale: float = 1) -> None:
        """Shows a file in a window of that width, px, and waits until it is there."""
        self.complaints.clear()
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=1000, deviceScaleFactor=scale, mobile=False,
        )  # fmt: skip
        shade = {"name": "prefers-color-scheme", "value": scheme}
        self._call("Emulation.setEmulatedMedia", features=[shade])
        self._call("Page.navigate", url=file.resolve().as_uri())
        while self.ask("document.readyState") != "complete" or self.ask("location.href") == (
            "about:blank"
        ):
            pass

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def shot(self, file: Path, height: int | None = None) -> None:
        """A picture of the page from its top; of all of it without a height."""
        width = self.ask("innerWidth")
        tall = height or self.ask("document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": width, "height": tall, "scale": 1}
        png = self._call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(png["data"]))

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            event = self._next()
            if event.get("id") == self._count:
                assert "error" not in event, event
                result: dict[str, Any] = event["result"]
                return result
            if event.get("method") in (
                "Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown",
            ):  # fmt: skip
                self.complaints.append(json.dumps(event["params"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = os.read(self._receive, 1 << 16)
            assert piece, "chromium has ended"
            self._rest += piece
        text, _, self._rest = self._rest.partition(b"\0")
        event: dict[str, Any] = json.loads(text)
        return event


@contextmanager
def browser() -> Iterator[Browser]:
    """A fresh chromium with a profile folder of its own."""
    assert CHROMIUM is not None
    down, send = os.pipe()
    receive, up = os.pipe()
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        words = (
            f"exec {CHROMIUM} --headless --no-sandbox --disable-gpu --hide-scrollbars "
            f"--disable-dev-shm-usage --no-first-run --user-data-dir={folder} "
            f"--remote-debugging-pipe 3<&{down} 4>&{up}"
        )
        process = subprocess.Popen(
            ["bash", "-c", words], pass_fds=(down, up), stderr=subprocess.DEVNULL
        )
        os.close(down)
        os.close(up)
        try:
            yield Browser(send, receive)
        finally:
            os.close(send)  # chromium ends with its pipe
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(receive)


def pictures(page: Path, folder: Path) -> None:
    """The page in light, in dark and at 500 px, small enough for a repository."""
    from PIL import Image

    with browser() as tab:
        for name, width, scheme, height in (
            ("report-light", 1100, "light", 1290),
            ("report-dark", 1100, "dark", 1290),
            ("report-500px", 500, "light", 1720),
        ):
            file = folder / f"{name}.png"
            tab.open(page, width, scheme)  # type: ignore[arg-type]
            tab.shot(file, height)
            with Image.open(file) as shot:
                shot.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(
                    file, optimize=True
                )


if __name__ == "__main__":
    pictures(Path(sys.argv[1]), Path(sys.argv[2]))
