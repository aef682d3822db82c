"""A page to draw a digit on and see it read: python -m src.draw. For this machine's own browser alone."""

import json
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from src import load
from src.cli.argparse_main import Parser, argparse_main
from src.core.errors import UserError
from src.core.process import open_in_browser

if TYPE_CHECKING:
    pass

PAGE = Path(__file__).with_suffix(".html")
HOST = "127.0.0.1"
AT_ONCE = Lock()  # a picture takes up to some 500 MB while it is decoded
MAX_BYTES = 1_000_000  # of a drawing; the page sends some 10,000


class Page(BaseHTTPRequestHandler):
    timeout = 10  # seconds of silence

    def __init__(self, reader: "Reader", *request: Any) -> None:
        self.reader = reader
        super().__init__(*request)

    def do_GET(self) -> None:
        if self.path == "/":
            self._send(200, "text/html; charset=utf-8", PAGE.read_bytes())
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        here = f"{HOST}:{self.connection.getsockname()[1]}"
        if self.headers.get("Host") != here or self.headers.get("Origin", f"http://{here}") != f"http://{here}":
            return self.send_error(403)  # another website, or another name for this machine
        if self.path != "/read" or not (length.isascii() and length.isdigit()) or int(length) > MAX_BYTES:
            return self.send_error(400)
        try:
            drawing = self.rfile.read(int(length))
            with AT_ONCE:
                answer, image = self.reader.read(drawing), self.reader.picture(drawing)
        except UserError as error:
            return self._send_json(422, {"error": str(error)})
        pixels = image.expand(3, -1, -1).permute(1, 2, 0)
        classes = self.reader.spec.classes
        self._send_json(
            200, {"answer": answer[self.reader.spec.label_name], "classes": classes, "image": pixels.tolist(), **answer}
        )

    def _send_json(self, status: int, value: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(value).encode())

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass  # a drawing asks many times a second


def serve(reader: "Reader", port: int) -> ThreadingHTTPServer:
    """A server on this machine's loopback; port 0 takes a free one. Raises UserError for a port in use."""
    try:
        return ThreadingHTTPServer((HOST, port), partial(Page, reader))
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"port {port}: {reason}; choose another with --port") from error


@argparse_main
def main() -> None:
    parser = Parser(prog="python -m src.draw", description="Serves a page to draw a digit on.")
    parser.add_argument(
        "weights", nargs="?", type=Path, help="a run folder, a .ckpt of one, or a .pt file; default: as shipped"
    )
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()

    with serve(load(arguments.weights), arguments.port) as server, suppress(KeyboardInterrupt, SystemExit):
        address = f"http://{HOST}:{server.server_port}"
        print(f"Draw at {address} (Ctrl-C ends it)", flush=True)
        open_in_browser(address)
        server.serve_forever()


if __name__ == "__main__":
    main()
