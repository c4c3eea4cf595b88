"""The page of a run that is still going on, served on this machine and renewed as the run grows.

Read-only: GET and HEAD of the page, its version and its data. It listens on the loopback address, and answers only
requests that are addressed to it, so that no web page that is open beside it can read it.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from diag.errors import InvalidInput
from diag.reporting.document import document
from diag.reporting.page import render
from diag.run.files import RECORDS_FILE, STEPS_FILE
from diag.run.reading import read_run

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SECONDS = 5
RENEW = """<script>
(() => {
  const now = "%s";
  const look = async () => {
    try {
      if ((await (await fetch("version")).text()) === now) return;
      sessionStorage.setItem("diag-at", scrollY);
      location.reload();
    } catch { /* the server has gone: the page stays */ }
  };
  const at = sessionStorage.getItem("diag-at");
  if (at) { scrollTo(0, Number(at)); sessionStorage.removeItem("diag-at"); }
  setInterval(look, %d);
})();
</script>
<noscript><meta http-equiv="refresh" content="%d"></noscript>
"""


class LivePage:
    """The page of the run in `folder`, made again only when the run has grown."""

    def __init__(self, folder: Path, seconds: float = SECONDS) -> None:
        self.folder, self.seconds = folder, seconds
        self._lock = threading.Lock()
        self._version, self._html, self._data = "", "", ""
        read_run(folder)  # a mistake is reported before anything is served

    def version(self) -> str:
        """What the files of the run are now: it changes with every record."""
        sizes = [(self.folder / name).stat().st_size for name in (STEPS_FILE, RECORDS_FILE)]
        return "-".join(map(str, sizes))

    def html(self) -> str:
        """The page as it is now."""
        self._renew()
        return self._html

    def data(self) -> str:
        """Its document as JSON."""
        self._renew()
        return self._data

    def _renew(self) -> None:
        with self._lock:
            version = self.version()
            if version == self._version:
                return
            made = document(read_run(self.folder))
            ending = RENEW % (version, round(1000 * self.seconds), max(1, round(self.seconds)))
            self._html = render(made).replace("</body>", f"{ending}</body>")
            self._data, self._version = json.dumps(made, allow_nan=False), version


def live_server(
    folder: Path, host: str = LOOPBACK[0], port: int = 0, *, public: bool = False
) -> ThreadingHTTPServer:
    """The server, bound and not yet serving; `serve_forever()` serves. Port 0 takes a free one.

    Raises InvalidInput for another host than this machine's without `public`, and where the port is taken.
    """
    if host not in LOOPBACK and not public:
        raise InvalidInput(
            f"The host is {host}; the page is served to this machine only, unless you give --public."
        )
    page = LivePage(folder)

    class Handler(_Handler):
        live, is_public = page, public

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise InvalidInput(f"{host}:{port} cannot be served ({error.strerror}); give another --port.") from None


class _Handler(BaseHTTPRequestHandler):
    live: LivePage
    is_public = False

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        name = (self.headers.get("Host") or "").rsplit(":", 1)[0].strip("[]")
        if not self.is_public and name not in LOOPBACK:
            self.send_error(403, "addressed to another host")
            return
        known: dict[str, tuple[str, Any]] = {
            "/": ("text/html; charset=utf-8", self.live.html),
            "/version": ("text/plain; charset=utf-8", self.live.version),
            "/report.json": ("application/json", self.live.data),
        }
        if self.path not in known:
            self.send_error(404, "there is /, /version and /report.json")
            return
        kind, made = known[self.path]
        try:
            data = made().encode()
        except Exception as error:
            self.send_error(503, f"the run cannot be read now: {type(error).__name__}")
            return
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are not logged."""
