"""Serve a page to draw a digit on and see the prediction: python -m src.draw. Only for this machine's own browser."""

import json
import os
import sys
import webbrowser
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from src.cli.argparse_main import Parser, argparse_main
from src.core.errors import UserError
from src.core.process import import_lightning
from src.core.run_folder import METRICS_FILE, read_file

PAGE = Path(__file__).with_suffix(".html")
HOST = "127.0.0.1"
MAX_BYTES = 1_000_000  # per drawing; the page sends some 10,000
PREDICTION_LOCK = Lock()  # decoding an image takes up to some 500 MB


class DrawHandler(BaseHTTPRequestHandler):
    """Answer the requests of the page, and of nobody else."""

    timeout = 10  # seconds of silence

    def __init__(self, predictor: Any, model: bytes, *request: Any) -> None:
        self.predictor, self.model = predictor, model
        super().__init__(*request)

    def do_GET(self) -> None:
        content = {"/": (PAGE.read_bytes(), "text/html; charset=utf-8"), "/model": (self.model, "application/json")}
        self._send(200, *content[self.path]) if self.path in content else self.send_error(404)

    def do_POST(self) -> None:
        length, own = self.headers.get("Content-Length", ""), f"{HOST}:{self.connection.getsockname()[1]}"
        if self.headers.get("Host") != own or self.headers.get("Origin", f"http://{own}") != f"http://{own}":
            return self.send_error(403)  # another website, or another name for this machine
        if self.path != "/predict" or not (length.isascii() and length.isdigit()) or int(length) > MAX_BYTES:
            return self.send_error(400)
        drawing, spec = self.rfile.read(int(length)), self.predictor.spec
        try:
            with PREDICTION_LOCK:
                image = self.predictor.preprocess_file(drawing)
                prediction = self.predictor.predict(image[None])[0]
        except UserError as error:
            return self._send(422, json.dumps({"error": str(error)}).encode())
        prediction["answer"] = prediction[spec.label_name]
        prediction["image"] = image.expand(3, -1, -1).permute(1, 2, 0).tolist()  # red, green and blue of each pixel
        self._send(200, json.dumps(prediction).encode())

    def _send(self, status: int, body: bytes, content_type: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass  # a stroke sends many requests per second


def describe_model(predictor: Any) -> dict[str, Any]:
    """Return the model's name and classes, and its size and test accuracy if they are recorded beside its weights."""
    file, spec = predictor.file.absolute(), predictor.spec
    records = filter(Path.is_file, (file.with_suffix(".json"), file.parents[1] / METRICS_FILE))
    record: dict[str, Any] = next(map(read_file, records), {"metrics": {}})
    name, size, accuracy = record.get("name", file.name), record.get("parameters"), record["metrics"].get("test/acc")
    return {"name": name, "parameters": size, "accuracy": accuracy, "label": spec.label_name, "classes": spec.classes}


def serve(predictor: Any, port: int) -> ThreadingHTTPServer:
    """Return a server on this machine's loopback; port 0 takes a free one. Raises UserError for a port in use."""
    model = json.dumps(describe_model(predictor)).encode()
    try:
        return ThreadingHTTPServer((HOST, port), partial(DrawHandler, predictor, model))
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port}: {error}; choose another") from error


@argparse_main
def main() -> None:
    """Serve a page to draw a digit on."""
    parser = Parser(prog="python -m src.draw", description=main.__doc__)
    parser.add_argument("weights", nargs="?", type=Path, help="run folder, .ckpt, or .pt file; default: shipped")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one; default: 8000")
    arguments = parser.parse_args()

    import_lightning()
    from src.training.predictor import load_predictor

    with serve(load_predictor(arguments.weights), arguments.port) as server, suppress(KeyboardInterrupt, SystemExit):
        url = f"http://{HOST}:{server.server_port}"
        print(f"Draw at {url} (Ctrl-C stops it)", flush=True)
        if sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
            webbrowser.open(url)
        server.serve_forever()


if __name__ == "__main__":
    main()
