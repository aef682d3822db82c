"""Test docs/lesson.html in chromium and compare it with the traces of runs."""

import json
import math
import random
import re
from pathlib import Path

import pytest
from test_backprop import train

from src.backprop.formulas import format_worked_step
from src.backprop.network import INPUTS, TARGETS, WEIGHTS, BackpropNet

pytestmark = pytest.mark.browser
DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "lesson.html"
NAMES = ("i1", "i2", "t1", "t2", *(f"w{n}" for n in range(1, 9)))
WORKED = dict(zip(NAMES, (*INPUTS, *TARGETS, *WEIGHTS), strict=True))


@pytest.fixture(scope="module")
def page_and_errors(browser):
    """Open a page that is reused, which takes a quarter of the time of a new one, and collect its errors."""
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or errors.append(request.url))
    yield page, errors
    page.close()


@pytest.fixture
def lesson(page_and_errors):
    """Return a function that opens the lesson from the file system; the test fails if an error occurs on the page."""
    page, errors = page_and_errors

    def open_page(url_hash="", width=1280, **media):
        page.goto("about:blank")  # otherwise another hash would not load the page reopened
        page.mouse.move(0, 0)
        page.set_viewport_size({"width": width, "height": 700})
        page.emulate_media(**{"color_scheme": "light", "reduced_motion": "no-preference"} | media)
        page.goto(f"{PAGE.as_uri()}#{url_hash}")
        return page

    yield open_page
    assert not errors


def draw_settings(count):
    generator = random.Random(0)
    ranges = {"i": (-2, 2), "t": (0, 1), "w": (-3, 3)}
    for _ in range(count):
        yield {name: generator.uniform(*ranges[name[0]]) for name in NAMES}, 10 ** generator.uniform(-1, 1)


def train_as_on_page(settings, lr, gradients, bias=0):
    """Train 100 steps with the page's choice of biases (0 none, 1 fixed, 2 learned); return the rows."""
    numbers = list(settings.values())
    net = BackpropNet(numbers[4:], [0.35, 0.6] if bias else None, bias == 2)
    return train(gradients, lr, net, numbers[:2], numbers[2:4])


# Everything that the page displays of one step: the exact values, the three columns, the texts of the drawing.
READ = """() => ({
    exact: Object.fromEntries([...document.querySelectorAll("[data-row]")].map(
        row => [row.children[0].textContent, Number(row.querySelector("data").value)])),
    columns: [...document.querySelectorAll("[data-row]")].map(row => [...row.children].slice(0, 3).map(
        cell => cell.textContent).concat(row.querySelector("data").textContent)),
    drawn: [...document.querySelectorAll("#drawing text")].map(text => text.textContent).join(", "),
})"""
# As one JSON string, which Playwright transfers faster than half a megabyte of values.
READ_100 = f"""() => JSON.stringify(Array.from({{length: 100}}, () => {{
    const values = ({READ})()
    document.getElementById("run1").click()
    return values
}}))"""
SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
TABLE_ROW = r"^\| (.+) \| (.+) \| (.+) \| (.+) \|$"
FIELDS = "names => names.map(name => Number(document.getElementById(name).value))"


def as_in_text(shown):
    """Return text of the page with its numbers as Python prints them: −1.5·10⁻⁷ as -1.5e-07."""
    shown = re.sub("·10([⁻⁰¹²³⁴-⁹]+)", lambda power: f"e{int(power[1].translate(SUPERSCRIPTS)):+03}", shown)
    return re.sub(r"−(?=\d)", "-", shown)


def round_as_drawn(value):
    """Round as the drawing does."""
    is_extreme = value and not 0.001 <= abs(value) < 1e4
    return float(f"{value:.1e}" if is_extreme else f"{value:.{3 if abs(value) < 0.1 else 4}g}")


@pytest.mark.slow
@pytest.mark.parametrize("bug", [0, 1])
def test_every_number_equals_the_trace(lesson, bug):
    gradients = ("equations", "spreadsheet")[bug]
    page = lesson()
    for number, (settings, lr) in enumerate(((WORKED, 0.5), *draw_settings(5))):
        bias = number % 3
        rows = train_as_on_page(settings, lr, gradients, bias)
        options = settings | {"eta": lr, "bug": bug, "bias": bias}
        page.goto(f"{PAGE.as_uri()}#{'&'.join(f'{name}={value!r}' for name, value in options.items())}")
        page.wait_for_function("lr => Number(document.getElementById('η').value) === lr", arg=lr)
        assert page.evaluate(FIELDS, list(settings)) == list(settings.values())
        page.locator("[data-row] >> nth=-1").click()  # from here on the drawing has the gradients too
        steps = json.loads(page.evaluate(READ_100))
        for row, step, next_row in zip(rows, steps, [*rows[1:], None], strict=True):
            on_page = {re.sub("∂E/∂|δ_", "dE_d", name): value for name, value in step["exact"].items()}
            expected = {name: row[name] for name in row if name in on_page}
            if next_row:
                expected |= {f"{name} next": next_row[name] for name in row if f"{name} next" in on_page}
            assert ("dE_db1" in expected, "b2 next" in on_page) == (bias == 2, bias == 2)
            assert {name: on_page[name] for name in expected} == pytest.approx(expected, abs=1e-12, rel=0)
            drawn = re.findall(r"\b([itwhoE]\d) ([-+.\de]+)", as_in_text(step["drawn"]))
            assert sorted(name for name, _ in drawn) == sorted((*NAMES, "h1", "h2", "o1", "o2", "E1", "E2"))
            for name, text in drawn:
                assert float(text) == pytest.approx(round_as_drawn(row[name]), rel=1e-9, abs=0), drawn
        # The three columns equal the worked step of the run in every character.
        table = re.findall(TABLE_ROW, format_worked_step(rows[0]), re.MULTILINE)
        assert sorted(tuple(map(as_in_text, row)) for row in steps[0]["columns"]) == sorted(table)


def test_worked_example_equals_the_lesson(lesson):
    values = lesson().evaluate(READ)
    table = re.findall(TABLE_ROW, (DOCS / "backprop.md").read_text(), re.MULTILINE)
    assert set(map(tuple, values["columns"])) <= set(table)
    assert values["exact"]["E_total"] == 0.014181377937891659


def read_exercises():
    lesson = (DOCS / "backprop.md").read_text()
    links = re.findall(r"^(\d)\. \[.+\]\(lesson\.html#(.+?)\)", lesson, re.MULTILINE)
    answers = dict(re.findall(r"^(\d)\. (-?\d\.\d+)", lesson, re.MULTILINE))
    return [(link, answers[number]) for number, link in links]


def test_exercises_accept_their_answers(lesson):
    exercises = read_exercises()
    assert len(exercises) >= 5
    page = lesson()
    for link, answer in exercises:
        page.goto(f"{PAGE.as_uri()}#{link}")
        page.wait_for_function("ask => document.querySelector('#ask').value && location.hash.includes(ask)", arg=link)
        page.wait_for_function("[...document.querySelectorAll('data')].some(data => data.textContent === '?')")
        assert check_answer(page, answer) == "Right, to the digits given."
        assert answer.lstrip("-")[:5] in page.locator("#sheet").inner_text()


def check_answer(page, answer):
    page.fill("#answer", answer)
    page.press("#answer", "Enter")
    return page.locator("#verdict").text_content()


# The worked example with t = (0.9, 0.1), i = (1, 2), η = 2.
EXERCISE = "i1=1&i2=2&t1=0.9&t2=0.1&eta=2"


def compute_answers():
    """Compute right and wrong answers by name, for a weight of the output layer and for w3, which the bug affects."""

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    w = dict(enumerate(WEIGHTS, start=1))
    h1, h2 = sigmoid(w[1] + 2 * w[2]), sigmoid(w[3] + 2 * w[4])
    o1, o2 = sigmoid(w[5] * h1 + w[6] * h2), sigmoid(w[7] * h1 + w[8] * h2)
    d1, d2 = (o1 - 0.9) * o1 * (1 - o1), (o2 - 0.1) * o2 * (1 - o2)
    slope, back = h2 * (1 - h2), d1 * w[6] + d2 * w[8]
    new6, new8 = w[6] - 2 * d1 * h2, w[8] - 2 * d2 * h2
    return {
        "dE_dw6": {
            "Right": d1 * h2,
            "σ′ of the output is forgotten": (o1 - 0.9) * h2,
            "sign": -d1 * h2,
            "last factor": d1,
        },
        "dE_dw3": {
            "Right": back * slope,
            "σ′ of the output is forgotten": ((o1 - 0.9) * w[6] + (o2 - 0.1) * w[8]) * slope,
            "σ′ of the hidden neuron is forgotten": back,
            "σ′ is forgotten twice": (o1 - 0.9) * w[6] + (o2 - 0.1) * w[8],
            "the second path is forgotten": d1 * w[6] * slope,
            "the first path is forgotten": d2 * w[8] * slope,
            "old and new weights are mixed": (d1 * new6 + d2 * new8) * slope,
            "the spreadsheet’s bug": back * h1 * (1 - h1),
            "sign": -back * slope,
        },
        "w3_next": {
            "Right": w[3] - 2 * back * slope,
            "sign": w[3] + 2 * back * slope,
            "old and new are mixed": w[3],
            "η is forgotten": w[3] - back * slope,
            "the second path is forgotten": w[3] - 2 * d1 * w[6] * slope,
            "the spreadsheet’s bug": w[3] - 2 * back * h1 * (1 - h1),
        },
    }


def test_each_mistake_is_named_in_the_verdict(lesson):
    page = lesson()
    # Call the page's own functions; other tests load the page and type.
    submit_answer = """([urlHash, answer]) => {
        readAddress(urlHash)
        const hidden = [...document.querySelectorAll("data")].some(data => data.textContent === "?")
        document.getElementById("answer").value = answer
        document.getElementById("turn").requestSubmit()
        return [hidden, document.getElementById("verdict").textContent]
    }"""
    for quantity, answers in compute_answers().items():
        for mistake, value in answers.items():
            url_hash = f"#{EXERCISE}&ask={quantity}&row={len(mistake) % 30}"
            is_hidden, verdict = page.evaluate(submit_answer, [url_hash, f"{value:.7g}"])
            assert is_hidden and mistake in verdict, (quantity, mistake, verdict)
            assert verdict.startswith("Right, to the digits given" if mistake == "Right" else "Not yet: ")
    assert "Not right yet" in check_answer(lesson(f"{EXERCISE}&ask=dE_dw6"), "0.777")


def test_answer_accepts_notations_and_enough_digits(lesson):
    page = lesson()

    def verdict(text, ask="∂E/∂w5"):
        page.select_option("#ask", ask)
        return check_answer(page, text)

    for right in ("0.0128808", "1.28808e-2", "0,0128808", "+1.28808E-02", " .01288 ", "0.012880818632"):
        assert verdict(right) == "Right, to the digits given.", right
    assert verdict("0.0128809").startswith("Not right yet")
    assert verdict("0.013") == "So far right. Give three digits at least."
    # Three digits of ∂E/∂w3 cannot distinguish it from the bug, five can.
    assert "cannot tell it from a mistake: that is the spreadsheet’s bug" in verdict("0.000352", "∂E/∂w3")
    assert verdict("0.00035178", "∂E/∂w3") == "Right, to the digits given."
    assert verdict("0.00035187", "∂E/∂w3").startswith("Not yet: that is the spreadsheet’s bug")
    for text, text_part in {"": "missing", "a lot": "not a number", "NaN": "not a number", "1e309": "smaller"}.items():
        assert verdict(text).startswith("Your value: ") and text_part in verdict(text)


def test_link_opens_at_its_question_and_hides_what_would_give_it_away(lesson):
    page = lesson("ask=dE_dw5", width=375)
    box = page.locator("#turn").bounding_box()
    assert box["y"] >= 0 and box["y"] + box["height"] <= 700
    assert find_highlighted(page) == {"w5"}  # not its factors
    on_page = {name: columns for name, *columns in page.evaluate(READ)["columns"]}
    assert page.locator("#factors").text_content() == "δ_o1 = 0.0254122, a_h1 = 0.506875"
    assert on_page["δ_o1"][2] == "0.02541224097" and on_page["∂E/∂w5"] == ["?"] * 3 and on_page["w5 next"][2] == "?"
    assert not re.search(r"0\.01288|0\.393559", page.locator("main").inner_html())
    page.click("#hint")
    assert page.locator("#verdict").text_content() == "∂E/∂w5 = δ_o1·a_h1"
    check_answer(page, "0.01288")
    assert "0.01288081863" in page.locator("#sheet").inner_text()


def test_play_trains_and_two_learning_rates_are_compared(lesson):
    page = lesson("eta2=2")
    page.check("#compare")
    assert page.locator("#play").bounding_box()["y"] < 50 < page.evaluate("scrollY")  # Play stays in view
    page.click("#play")
    page.wait_for_function("document.getElementById('loss').textContent === 'loss 4'")
    assert page.locator("#live").is_visible() and not find_highlighted(page)
    page.click("#play")
    step = int(page.locator("#loss").text_content().removeprefix("loss "))
    cells = page.locator("#compared tr >> nth=1").locator("td").all_text_contents()
    losses = [train_as_on_page(WORKED, lr, "equations")[step - 1]["E_total"] for lr in (0.5, 2)]
    assert cells == [f"{loss:.4g}" for loss in losses]
    assert page.locator("#charts polyline.second").count() == 2


def test_drawing_and_formula_come_before_the_sliders_on_a_phone(lesson):
    page = lesson("row=17", width=375)
    tops = [page.locator(name).bounding_box()["y"] for name in ("#drawing", "#caption", "#start")]
    assert tops == sorted(tops) and tops[1] < 700


def test_wrong_input_prints_a_message_beside_the_field(lesson):
    page = lesson()
    before = page.evaluate(READ)
    for name, text, text_part in (
        ("w1", "many", "not a number"),
        ("w1", "", "a number is missing"),
        ("w1", "1e309", "must be from -1000 to 1000"),
        ("i1", "-Infinity", "not a number"),
        ("η", "0", "η must be above 0"),
        ("η", "1e7", "must be from 0 to 1000000"),
    ):
        page.fill(f"[id='{name}']", text)
        assert text_part in page.locator(f"[id='{name}-word']").text_content(), (name, text)
        assert page.get_attribute(f"[id='{name}']", "aria-invalid") == "true"
        assert page.evaluate(READ) == before
        page.fill(f"[id='{name}']", "0,25")
        assert page.locator(f"[id='{name}-word']").text_content() == ""
        assert page.evaluate(READ) != before
        page.click("#worked")
        assert page.evaluate(READ) == before


def test_extreme_numbers_give_no_nan_and_no_infinity(lesson):
    for url_hash in "i1=1000&w1=1000&w5=-1000", "eta=1000000&t1=1000", "i1=0&i2=0&eta=1e-300":
        page = lesson(url_hash)
        page.click("#run100")
        assert page.locator("#sheet").get_by_text(re.compile("NaN|Infinity")).count() == 0
        assert "NaN" not in page.locator("#charts").inner_html()


def test_url_restores_the_whole_page(lesson):
    page = lesson()
    page.fill("#w1", "-0,75")
    page.fill("[id='η']", "70")
    page.check("#bug")
    page.click("#run10")
    page.click("#next")
    page.select_option("#ask", "w7 next")
    page.wait_for_function("location.hash.includes('ask=w7_next')")
    values = page.evaluate(READ)
    reopened = lesson(page.url.partition("#")[2])
    assert reopened.evaluate(READ) == values
    assert reopened.locator("#where").text_content() == "32 of 33"  # the row that is asked
    assert reopened.locator("#loss").text_content() == "loss 11"
    assert reopened.is_checked("#bug") and reopened.input_value("[id='η']") == "70"
    reopened.click("#worked")
    reopened.wait_for_function("location.hash === '#' || location.hash === ''")
    assert reopened.evaluate(READ) == lesson().evaluate(READ)


def test_wrong_url_parameters_are_listed(lesson):
    lesson("row=3").evaluate("location.hash = 'row=35&ask=dE_db1'")  # which only biases have
    page = lesson("w1=x&step=0&row=99&nonsense=1&bug=2&w2=0.3")
    message = page.locator("#address").text_content()
    assert all(f"{name}: " in message for name in ("w1", "step", "row", "nonsense", "bug")) and "w2" not in message
    assert page.input_value("#w2") == "0.3" and page.input_value("#w1") == "0.15"


def test_keyboard_reaches_every_control(lesson):
    page = lesson()
    for _ in range(17):
        page.keyboard.press("ArrowRight")
    assert "∂E/∂a_h1δ_o1·w5 + δ_o2·w7" in page.locator("#caption").text_content()
    assert find_highlighted(page) == {"w5", "w7", "h1", "o1", "o2"}
    assert {"+ 0.0102", "+ 0.0152"} <= set(page.locator(".edge .term").all_text_contents())  # the two addends
    page.keyboard.press("ArrowLeft")
    assert page.locator("#where").text_content() == "17 of 33"
    for _ in range(17):
        page.keyboard.press("ArrowRight")
    assert [page.locator(name).text_content() for name in ("#loss", "#where")] == ["loss 2", "1 of 33"]

    focused = [""]
    while focused[-1] != "finite difference of ∂E/∂w4" and len(focused) < 100:  # the last on the page
        page.keyboard.press("Tab")
        active = "e => e.id || e.dataset.part || e.ariaLabel || e.textContent"
        focused.append(page.evaluate(f"({active})(document.activeElement)"))
        if focused[-1] == "w1" and "w1" not in focused[:-1]:  # the weight; the field comes later
            assert find_highlighted(page) == {"w1", "i1", "h1", "w5", "w7", "o1", "o2", *ERROR}
            assert "Two ways" in page.locator("#why").text_content()
        elif focused[-1] == "w1-slider":
            page.keyboard.press("ArrowRight")
            assert page.input_value("#w1") == "0.16"
    expected = {*NAMES, *(f"{name}-slider" for name in NAMES), "run1", "run10", "run100", "η", "η-slider"}
    expected |= {"back", "next", "first", "worked", "bug", "h", "ask", "answer", "reveal", "Check", "hint"}
    expected |= {"play", "compare", "bias"}
    assert expected <= set(focused), expected - set(focused)
    nameless = """[...document.querySelectorAll("input, select, button, [tabindex]")].filter(
        e => !(e.labels?.length || e.ariaLabel || e.textContent.trim())).length"""
    assert page.evaluate(nameless) == 0


ERROR = {"E1", "E2", "E_total"}


def find_highlighted(page):
    return set(page.locator(".lit[data-part]").evaluate_all("parts => parts.map(part => part.dataset.part)"))


def test_hover_highlights_the_path_of_a_weight(lesson):
    page = lesson()
    page.hover("[data-weight='5'] text >> nth=0")
    assert find_highlighted(page) == {"w5", "h1", "o1", "E1", "E_total"}
    assert page.locator(".edge.back").count() == 2  # their arrows point backward
    path = page.locator("#caption").text_content()
    assert "∂E/∂a_o1·∂a_o1/∂o1·∂o1/∂w5" in path and "0.0128808" in path
    page.hover("[data-row='18']")
    assert find_highlighted(page) == {"w6", "w8", "h2", "o1", "o2"}
    page.hover("h1")
    page.hover("#caption [data-factor=w2]")
    assert page.locator(".pointed").get_attribute("data-part") == "w2"
    page.hover("h1")
    assert page.locator(".pointed").count() == 0
    assert find_highlighted(page) == {"w1", "w2", "i1", "i2", "h1"}  # the current row again


@pytest.mark.parametrize("width", [320, 1280])
def test_page_does_not_scroll_sideways(lesson, width):
    for state in ("row=17", "w1=-0.123456789&w7=-987.654321&t2=-0.3333&eta=123.456&step=7&row=22&bug=1&nonsense=1"):
        page = lesson(state, width, reduced_motion="reduce")
        page.fill("#w2", "wrong")
        page.locator("td button").evaluate_all("buttons => buttons.forEach(button => button.click())")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("getComputedStyle(document.querySelector('.edge line')).transitionDuration") == "0s"


def test_prints_on_one_page(lesson):
    page = lesson("row=17")
    assert len(re.findall(rb"/Type\s*/Page\b", page.pdf(prefer_css_page_size=True))) == 1
