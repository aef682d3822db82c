"""A page to draw a digit on and see it read: python -m src.draw. For this machine's own browser alone."""

import json
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.arguments import Parser, entry
from src.errors import UserError

if TYPE_CHECKING:
    from torch import nn

PAGE = Path(__file__).with_suffix(".html")
MAX_BYTES = 1_000_000  # of a drawing; the page sends some 10,000


class Page(BaseHTTPRequestHandler):
    def __init__(self, net: "nn.Module", *request: Any) -> None:
        self.net = net
        super().__init__(*request)

    def do_GET(self) -> None:
        if self.path == "/":
            self._send(200, "text/html; charset=utf-8", PAGE.read_bytes())
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        from src.data.files import read_image
        from src.predict import predict, ranking

        length = self.headers.get("Content-Length", "")
        if self.path != "/read" or not length.isdigit() or int(length) > MAX_BYTES:
            return self.send_error(400)
        try:
            image = read_image(self.rfile.read(int(length)))
        except UserError as error:
            return self._send_json(422, {"error": str(error)})
        answer = ranking(predict(self.net, image[None])[0])
        self._send_json(200, {**answer, "image": image.flatten().tolist()})

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


def serve(net: "nn.Module", port: int) -> ThreadingHTTPServer:
    """A server on this machine's loopback; port 0 takes a free one. Raises UserError for a port in use."""
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(Page, net))
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"port {port}: {reason}; choose another with --port") from error


@entry
def main() -> None:
    parser = Parser(prog="python -m src.draw", description="Serves a page to draw a digit on.")
    parser.add_argument(
        "weights", nargs="?", type=Path, help="a run folder, a .ckpt of one, or a .pt file; default: as shipped"
    )
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()

    from src.weights import load

    with serve(load(arguments.weights).net, arguments.port) as server, suppress(KeyboardInterrupt):
        print(f"Draw at http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
