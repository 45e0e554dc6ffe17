"""A page in headless Chromium, driven by the DevTools protocol over the browser's own pipe: no port, no package.

Messages are JSON objects, each with a NUL byte behind it, on the descriptors 3 (to the browser) and 4 (from it).
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
          "--disable-dev-shm-usage", "--remote-debugging-pipe")  # fmt: skip


class Page:
    """An open page of a given width, in light or dark colours.

    Args:
        address: of the page.
        profile: an empty or missing directory for the browser's own files.
        width: of the screen, in CSS pixels.
        dark: whether the user prefers dark colours.

    Attributes:
        requests: address of everything that the page has asked for, the page itself included.
        complaints: what it has written to the console, and the errors it has thrown.
    """

    def __init__(self, address: str, profile: Path, width: int, dark: bool = False):
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._numbers, self._session, self._loaded = 0, "", False
        self._reader, browser_out = os.pipe()
        browser_in, self._writer = os.pipe()
        assert BROWSER is not None
        command = f'exec "$@" 3<&{browser_in} 4>&{browser_out}'
        self._browser = subprocess.Popen(
            ["bash", "-c", command, "bash", BROWSER, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(browser_in, browser_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(browser_in)
        os.close(browser_out)
        self._stream = os.fdopen(self._reader, "rb")
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=True)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=address)
        while not self._loaded:
            self._receive()

    def __enter__(self) -> Page:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        os.close(self._writer)  # the browser ends when its pipe does
        try:
            self._browser.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._browser.kill()
            self._browser.wait()
        self._stream.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._numbers += 1
        message = {"id": self._numbers, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writer, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._numbers:
            pass
        assert "error" not in answer, f"{method}: {answer}"
        return answer["result"]

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression; it must be JSON-able."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Save a PNG of the whole page."""
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(picture["data"]))

    def _receive(self) -> dict[str, Any]:
        data = bytearray()
        while (byte := self._stream.read(1)) != b"\0":
            assert byte, "the browser has ended"
            data += byte
        message = json.loads(data)
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.complaints.append(json.dumps(parameters))
        elif method == "Page.loadEventFired":
            self._loaded = True
        return message
