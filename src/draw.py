"""Serve a page to draw a digit on and see the prediction: python -m src.draw. Only for this machine's own browser."""

import json
import os
import sys
import webbrowser
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from src.cli.argparse_main import Parser, argparse_main
from src.core.errors import UserError
from src.core.process import import_lightning
from src.core.run_folder import METRICS_FILE, read_file

PAGE = Path(__file__).with_suffix(".html")
HOST = "127.0.0.1"
MAX_BYTES = 1_000_000  # per drawing; the page sends some 10,000


class DrawHandler(BaseHTTPRequestHandler):
    """Answer the requests of the page, and of nobody else."""

    timeout = 10  # seconds of silence

    def __init__(self, predictor: Any, *request: Any) -> None:
        self.predictor = predictor
        super().__init__(*request)

    def do_GET(self) -> None:
        if self.path == "/model":
            self._send(200, describe_model(self.predictor))
        else:
            self._send(200, PAGE.read_bytes(), "text/html; charset=utf-8")

    def do_POST(self) -> None:
        length, own = int(self.headers.get("Content-Length", 0)), f"{HOST}:{self.connection.getsockname()[1]}"
        is_own = self.headers.get("Host") == own and self.headers.get("Origin", f"http://{own}") == f"http://{own}"
        if not is_own or not 0 <= length <= MAX_BYTES:
            return self.send_error(403)  # another website, or another name for this machine
        try:
            image = self.predictor.preprocess_file(self.rfile.read(length))
        except UserError as error:
            return self._send(422, {"error": str(error)})
        prediction = self.predictor.predict(image[None])[0]
        prediction["answer"] = prediction[self.predictor.spec.label_name]
        prediction["image"] = image.expand(3, -1, -1).permute(1, 2, 0).tolist()  # red, green and blue of each pixel
        self._send(200, prediction)

    def _send(self, status: int, body: Any, content_type: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.end_headers()
        self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

    def log_message(self, *_: object) -> None:
        pass  # a stroke sends many requests per second


def describe_model(predictor: Any) -> dict[str, Any]:
    """Return the model's name and classes, and its size and test accuracy if they are recorded beside its weights."""
    file, spec = predictor.file.absolute(), predictor.spec
    records = filter(Path.is_file, (file.with_suffix(".json"), file.parents[1] / METRICS_FILE))
    record: dict[str, Any] = next(map(read_file, records), {"metrics": {}})
    name, size, accuracy = record.get("name", file.name), record.get("parameters"), record["metrics"].get("test/acc")
    return {"name": name, "parameters": size, "accuracy": accuracy, "label": spec.label_name, "classes": spec.classes}


def serve(predictor: Any) -> ThreadingHTTPServer:
    """Return a server on a free port of this machine's loopback."""
    return ThreadingHTTPServer((HOST, 0), partial(DrawHandler, predictor))


@argparse_main
def main() -> None:
    """Serve a page to draw a digit on."""
    parser = Parser(prog="python -m src.draw", description=main.__doc__)
    parser.add_argument("weights", nargs="?", type=Path, help="run folder, .ckpt, or .pt file; default: shipped")
    arguments = parser.parse_args()

    import_lightning()
    from src.training.predictor import load_predictor

    server = serve(load_predictor(arguments.weights))
    url = f"http://{HOST}:{server.server_port}"
    print(f"Draw at {url} (Ctrl-C stops it)", flush=True)
    if sys.platform != "linux" or os.environ.get("DISPLAY"):  # a text browser would take the terminal
        webbrowser.open(url)
    server.serve_forever()


if __name__ == "__main__":
    main()
