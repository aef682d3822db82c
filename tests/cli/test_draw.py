import http.client
import json
import runpy
import threading
from pathlib import Path

import pytest

from src import draw
from src.training.predictor import SHIPPED_WEIGHTS, load_predictor

IMAGES = Path(__file__).parents[1] / "images"


@pytest.fixture
def served(small_weights):
    """Starts a server on given weights; gives its port."""
    servers = []

    def start(weights=small_weights) -> int:
        servers.append(draw.serve(load_predictor(weights), 0))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1].server_port

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(port, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, body, headers or {})
    reply = connection.getresponse()
    return reply.status, reply.read()


def test_a_posted_picture_is_read(served):
    port = served()
    status, page = ask(port, "GET", "/")
    assert status == 200 and b"<canvas" in page and b"//" not in page.split(b"<script>")[0]  # nothing from elsewhere
    status, body = ask(port, "POST", "/read", (IMAGES / "2.gif").read_bytes())
    answer = json.loads(body)
    assert status == 200 and len(answer["image"]) == len(answer["image"][0]) == 28
    assert sum(answer["probabilities"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "method, path, body, headers, status",
    [
        ("GET", "/../../etc/passwd", None, {}, 404),
        ("POST", "/read", b"no picture", {}, 422),
        ("POST", "/other", b"", {}, 400),
        ("POST", "/read", b"", {"Content-Length": "-1"}, 400),
        ("POST", "/read", b"", {"Content-Length": "99999999999"}, 400),
        ("POST", "/read", b"", {"Content-Length": "²".encode("latin-1")}, 400),
        ("POST", "/read", b"", {"Origin": "http://example.org"}, 403),
        ("POST", "/read", b"", {"Host": "example.org"}, 403),
    ],
)
def test_other_requests_are_refused(served, method, path, body, headers, status):
    assert ask(served(), method, path, body, headers)[0] == status


def test_a_port_in_use_is_one_line(served, run_main, small_weights):
    port = served()
    result = run_main(small_weights, "--port", port, main=draw.main)
    assert result.code == 2 and result.err.startswith(f"error: port {port}: ") and result.err.count("\n") == 1


@pytest.fixture
def page(browser, served):
    """The page, on the shipped weights."""
    page = browser.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"http://127.0.0.1:{served(SHIPPED_WEIGHTS)}")
    yield page
    page.close()
    assert not errors


def draw_strokes(page, strokes, smooth) -> None:
    box = page.locator("#page").bounding_box()
    for stroke in strokes:
        points = [(box["x"] + 80 + 200 * x, box["y"] + 50 + 220 * y) for x, y in smooth(stroke)[::4]]
        page.mouse.move(*points[0])
        page.mouse.down()
        for point in points:
            page.mouse.move(*point)
        page.mouse.up()


@pytest.mark.browser
def test_digits_drawn_with_the_mouse_are_read(page):
    drawing = runpy.run_path(str(IMAGES / "draw.py"))
    answer = page.locator("#answer")
    for digit in 2, 3, 5, 7:
        draw_strokes(page, drawing["STROKES"][digit], drawing["smooth"])
        page.wait_for_function("digit => document.querySelector('#answer').textContent === digit", arg=str(digit))
        bars = page.locator(".bar").evaluate_all("bars => bars.map(bar => parseFloat(bar.style.width))")
        assert sum(bars) == pytest.approx(100, abs=0.1) and max(bars) == bars[digit]
        assert page.evaluate("Math.max(...seen.getImageData(0, 0, 28, 28).data.filter((_, i) => i % 4 == 0))") == 255
        page.keyboard.press("Escape") if digit % 2 else page.click("#clear")
        assert answer.text_content() == ""


@pytest.mark.browser
def test_the_page_says_when_the_server_is_gone(page):
    page.route("**/read", lambda route: route.abort())
    page.mouse.click(*[side + 100 for side in page.locator("#page").bounding_box().values()][:2])
    page.wait_for_function("document.querySelector('#note').textContent.includes('start it again')")


@pytest.mark.browser
def test_a_stroke_is_taken_back_and_a_dot_is_not_sure(page):
    drawing = runpy.run_path(str(IMAGES / "draw.py"))
    answer = page.locator("#answer")
    draw_strokes(page, drawing["STROKES"][7], drawing["smooth"])
    page.wait_for_function("document.querySelector('#answer').textContent === '7' && !asking")
    seen = "seen.getImageData(0, 0, 28, 28).data.join()"
    before, box = page.evaluate(seen), page.locator("#page").bounding_box()
    page.mouse.click(box["x"] + 300, box["y"] + 300)
    page.wait_for_function(f"before => {seen} !== before", arg=before)
    page.click("#undo")
    page.wait_for_function(f"before => {seen} === before", arg=before)
    for _ in range(2):
        page.keyboard.press("Control+z")
    assert answer.text_content() == ""
    page.mouse.click(box["x"] + 100, box["y"] + 100)
    page.wait_for_function("document.querySelector('#note').textContent.startsWith('not sure')")


@pytest.mark.browser
@pytest.mark.parametrize("width, height", [(1280, 700), (375, 667), (320, 568), (667, 375)])
def test_all_of_it_is_in_sight(page, width, height):
    page.set_viewport_size({"width": width, "height": height})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    low = page.locator(".row >> nth=-1").bounding_box()
    assert low["y"] + low["height"] <= height or (width > height and height < 400)
    drawing = runpy.run_path(str(IMAGES / "draw.py"))
    box = page.locator("#page").bounding_box()
    for x, y in drawing["smooth"](drawing["STROKES"][0][0])[::2]:
        place = box["x"] + box["width"] * (0.25 + 0.7 * x), box["y"] + box["height"] * (0.15 + 0.7 * y)
        page.mouse.move(*place)
        page.mouse.down()
    page.mouse.up()
    page.wait_for_function("document.querySelector('#answer').textContent === '0'")
