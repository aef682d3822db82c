import http.client
import json
import threading
from pathlib import Path

import pytest

from src import draw
from src.training.predictor import SHIPPED_WEIGHTS, load_predictor
from tests.images.strokes import STROKES, smooth

IMAGES = Path(__file__).parents[1] / "images"


@pytest.fixture
def start_server(small_weights):
    """Return a function that starts a server on given weights and returns its port."""
    servers = []

    def start(weights=small_weights) -> int:
        servers.append(draw.serve(load_predictor(weights)))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1].server_port

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def send(port, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    return response.status, response.read()


def test_server_serves_the_page_and_predicts_a_posted_image(start_server):
    port = start_server()
    status, page = send(port, "GET", "/")
    assert status == 200 and b"<canvas" in page and b"//" not in page.split(b"<script>")[0]  # loads nothing
    status, body = send(port, "POST", "/predict", (IMAGES / "2.gif").read_bytes())
    answer = json.loads(body)
    assert status == 200 and len(answer["image"]) == len(answer["image"][0]) == 28
    assert answer["answer"] == answer["digit"] and sum(answer["probabilities"]) == pytest.approx(1, abs=1e-5)
    model = json.loads(send(port, "GET", "/model")[1])
    assert (model["name"], model["accuracy"], len(model["classes"])) == ("small.pt", None, 10)


@pytest.mark.parametrize(
    "method, path, body, headers, status",
    [
        ("POST", "/predict", b"not an image", {}, 422),
        ("POST", "/predict", b"", {"Content-Length": "-1"}, 403),
        ("POST", "/predict", b"", {"Content-Length": "99999999999"}, 403),
        ("POST", "/predict", b"", {"Origin": "http://example.org"}, 403),
        ("POST", "/predict", b"", {"Host": "example.org"}, 403),
    ],
)
def test_request_of_another_page_or_form_is_refused(start_server, method, path, body, headers, status):
    assert send(start_server(), method, path, body, headers)[0] == status


@pytest.fixture
def page(browser, start_server):
    page = browser.new_page(viewport={"width": 320, "height": 568})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"http://127.0.0.1:{start_server(SHIPPED_WEIGHTS)}")
    yield page
    page.close()
    assert not errors


def draw_digit(page, digit, answer) -> None:
    box = page.locator("#page").bounding_box()
    for stroke in STROKES[digit]:
        points = [box["x"] + box["width"] * (0.3 + 0.6 * x) for x, _ in smooth(stroke)[::4]]
        rows = [box["y"] + box["height"] * (0.2 + 0.65 * y) for _, y in smooth(stroke)[::4]]
        page.mouse.move(points[0], rows[0])
        page.mouse.down()
        for x, y in zip(points, rows, strict=True):
            page.mouse.move(x, y)
        page.mouse.up()
    page.wait_for_function(f"document.querySelector('#answer').textContent === '{answer}' && !isWaiting")


@pytest.mark.browser
def test_drawn_digits_are_predicted_and_a_dot_is_not_sure(page):
    record = json.loads(SHIPPED_WEIGHTS.with_suffix(".json").read_text())
    for text in record["name"], f"{record['parameters']:,} parameters", f"{record['metrics']['test/acc']:.2%} test":
        assert text in page.locator("#model").text_content()
    assert page.locator("#hint").is_visible()
    for digit in 2, 3, 5, 7:
        draw_digit(page, digit, digit)
        bars = page.locator(".bar").evaluate_all("bars => bars.map(bar => parseFloat(bar.style.width))")
        assert sum(bars) == pytest.approx(100, abs=0.1) and max(bars) == bars[digit]
        probability = ">99.9%" if max(bars) > 99.95 else f"{max(bars):.1f}%"
        assert page.locator("#probability").text_content() == probability and page.locator("#hint").is_hidden()
        page.keyboard.press("Escape") if digit % 2 else page.click("#clear")
        assert page.locator("#answer").text_content() == ""
    page.mouse.click(*[side + 50 for side in page.locator("#page").bounding_box().values()][:2])
    page.wait_for_function("document.querySelector('#note').textContent.startsWith('Unlike the training')")
    page.click("#undo")
    page.route("**/predict", lambda route: route.abort())
    page.mouse.click(*[side + 50 for side in page.locator("#page").bounding_box().values()][:2])
    page.wait_for_function("document.querySelector('#note').textContent.includes('start it again')")


@pytest.mark.browser
def test_examples_are_predicted(page):
    for digit in range(10):
        page.click(f"[title='example {digit}']")
        page.wait_for_function(f"document.querySelector('#answer').textContent === '{digit}' && !isWaiting")


@pytest.mark.browser
def test_finger_and_pen_draw_but_a_second_finger_does_not(page):
    send_pointer = """(x, y, type, options) => document.querySelector("#page").dispatchEvent(
        new PointerEvent(type, {clientX: x, clientY: y, pointerId: 7, isPrimary: true, ...options}))"""
    page.evaluate("document.querySelector('#page').setPointerCapture = () => {}")
    page.evaluate("document.querySelector('#page').hasPointerCapture = () => true")
    for kind, pressure, width in ("touch", 0, 44), ("pen", 0.25, 35.2):
        for number, event in enumerate(("pointerdown", "pointermove", "pointerup")):
            at = f"({60 + 20 * number}, 200, '{event}', {{pointerType: '{kind}', pressure: {pressure}}})"
            page.evaluate(f"({send_pointer}){at}")
        assert page.evaluate("strokes.at(-1).map(point => point[2])") == pytest.approx([width] * 3)
    page.evaluate(f"({send_pointer})(90, 200, 'pointerdown', {{pointerType: 'touch', isPrimary: false}})")
    assert page.evaluate("strokes.length") == 2


@pytest.mark.browser
@pytest.mark.parametrize("width, height", [(1920, 1000), (1280, 700), (375, 667), (320, 568)])
def test_page_shows_everything_without_scrolling(page, width, height):
    page.set_viewport_size({"width": width, "height": height})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    last = page.locator(".row >> nth=-1").bounding_box()
    assert last["y"] + last["height"] <= height
    draw_digit(page, 0, 0)
