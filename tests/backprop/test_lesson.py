"""docs/lesson.html in Debian's chromium, held against the traces of runs."""

import csv
import json
import math
import random
import re
from pathlib import Path
from urllib.parse import quote

import lightning as L
import pytest

from src.backprop.callbacks import TraceCallback
from src.backprop.datamodule import OneSampleDataModule
from src.backprop.formulas import worked_step
from src.backprop.network import INPUTS, TARGETS, WEIGHTS, BackpropModule, BackpropNet, GradientDescent

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "lesson.html"
NAMES = ("i1", "i2", "t1", "t2", *(f"w{n}" for n in range(1, 9)))
WORKED = dict(zip(NAMES, (*INPUTS, *TARGETS, *WEIGHTS), strict=True))


@pytest.fixture(scope="module")
def watched(browser):
    """A page, and what has failed on it: to load another costs a quarter of a new one."""
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or errors.append(request.url))
    yield page, errors
    page.close()


@pytest.fixture
def lesson(watched):
    """Opens the lesson from the file system, as if for the first time; nothing may fail on it."""
    page, errors = watched

    def open_page(address="", width=1280, **media):
        page.goto("about:blank")  # else another #… would be the same page still
        page.mouse.move(0, 0)
        page.set_viewport_size({"width": width, "height": 700})
        page.emulate_media(**{"color_scheme": "light", "reduced_motion": "no-preference"} | media)
        page.goto(f"{PAGE.as_uri()}#{address}")
        return page

    yield open_page
    assert not errors


def address(settings, **more):
    return "&".join(f"{quote(name)}={value!r}" for name, value in (settings | more).items())


def random_settings(count):
    draw = random.Random(0)
    ranges = {"i": (-2, 2), "t": (0, 1), "w": (-3, 3)}
    for _ in range(count):
        yield {name: draw.uniform(*ranges[name[0]]) for name in NAMES}, 10 ** draw.uniform(-1, 1)


def trace(folder, settings, lr, gradients):
    """trace.csv of a run of 100 steps: a list of rows."""
    values = list(settings.values())
    module = BackpropModule(BackpropNet(values[4:]), lambda p: GradientDescent(p, lr=lr), gradients=gradients)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = L.Trainer(
        max_epochs=100,
        accelerator="cpu",
        callbacks=TraceCallback(),
        default_root_dir=folder,
        enable_model_summary=False,
        **quiet,
    )
    trainer.fit(module, OneSampleDataModule(values[:2], values[2:4]))
    with (folder / "trace.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


# Everything that the page says of one step: the exact values, the three columns, the texts of the drawing.
READ = """() => ({
    exact: Object.fromEntries([...document.querySelectorAll("[data-row]")].map(
        row => [row.children[0].textContent, Number(row.querySelector("data").value)])),
    columns: [...document.querySelectorAll("[data-row]")].map(row => [...row.children].slice(0, 3).map(
        cell => cell.textContent).concat(row.querySelector("data").textContent)),
    drawn: [...document.querySelectorAll("#drawing text")].map(text => text.textContent).join(", "),
})"""
# As one text: Playwright takes longer over half a megabyte of values than the page over its hundred steps.
READ_100 = f"""() => JSON.stringify(Array.from({{length: 100}}, () => {{
    const said = ({READ})()
    document.getElementById("run1").click()
    return said
}}))"""
FIELDS = "names => names.map(name => Number(document.getElementById(name).value))"


def as_drawn(value):
    """The drawing's short numbers."""
    size = abs(value)
    if value and (size < 0.001 or size >= 1e4):
        return float(f"{value:.1e}")
    return float(f"{value:.{3 if size < 0.1 else 4}g}")


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("slip", [0, 1])
def test_every_number_is_that_of_the_trace(lesson, tmp_path, slip, monkeypatch):
    monkeypatch.setattr("src.backprop.plots.save", lambda *_: None)  # of 12 runs
    gradients = ("equations", "spreadsheet")[slip]
    page = lesson()
    farthest = 0.0
    for settings, lr in ((WORKED, 0.5), *random_settings(5)):
        rows = trace(tmp_path, settings, lr, gradients)
        page.goto(f"{PAGE.as_uri()}#{address(settings, eta=lr, slip=slip)}")
        page.wait_for_function("lr => Number(document.getElementById('η').value) === lr", arg=lr)
        assert page.evaluate(FIELDS, list(settings)) == list(settings.values())
        page.locator("[data-row='26']").click()  # from here on the drawing has the gradients too
        said = json.loads(page.evaluate(READ_100))
        for row, step, after in zip(rows, said, [*rows[1:], None], strict=True):
            on_page = {name.replace("∂E/∂", "dE_d"): value for name, value in step["exact"].items()}
            apart = {name: abs(on_page[name] - row[name]) for name in row if name in on_page}
            if after:
                apart |= {f"w{n} next": abs(on_page[f"w{n} next"] - after[f"w{n}"]) for n in range(1, 9)}
            assert max(apart.values()) <= 1e-12, (settings, row["step"], apart)
            farthest = max(farthest, *apart.values())
            drawn = re.findall(r"\b([itwhoE]\d) ([-+.\de]+)", step["drawn"])
            assert sorted(name for name, _ in drawn) == sorted((*NAMES, "h1", "h2", "o1", "o2", "E1", "E2"))
            assert all(math.isclose(float(shown), as_drawn(row[name]), rel_tol=1e-9) for name, shown in drawn), drawn
        # The three columns, to the last character, are what the project's own worked step says.
        first = {name: value for name, value in rows[0].items() if name != "step"}
        told = re.findall(r"^\| (.+) \| (.+) \| (.+) \| (.+) \|$", worked_step(first, lr, gradients), re.MULTILINE)
        assert sorted(map(tuple, said[0]["columns"])) == sorted(told)
    print(f"farthest from the trace: {farthest:.1e}")


@pytest.mark.browser
def test_the_worked_example_is_the_lesson(lesson):
    said = lesson().evaluate(READ)
    table = re.findall(r"^\| (.+) \| (.+) \| (.+) \| (.+) \|$", (DOCS / "backprop.md").read_text(), re.MULTILINE)
    assert set(map(tuple, said["columns"])) <= set(table)
    assert said["exact"]["E_total"] == 0.014181377937891659


def exercises():
    lesson = (DOCS / "backprop.md").read_text()
    links = re.findall(r"^(\d)\. \[.+\]\(lesson\.html#(.+?)\)", lesson, re.MULTILINE)
    answers = dict(re.findall(r"^(\d)\. (-?\d\.\d+)", lesson, re.MULTILINE))
    return [(link, answers[number]) for number, link in links]


@pytest.mark.browser
def test_exercises_of_the_lesson(lesson):
    found = exercises()
    assert len(found) >= 5
    page = lesson()
    for link, answer in found:
        page.goto(f"{PAGE.as_uri()}#{link}")
        page.wait_for_function("ask => document.querySelector('#ask').value && location.hash.includes(ask)", arg=link)
        page.wait_for_function("[...document.querySelectorAll('data')].some(data => data.textContent === '?')")
        assert judged(page, answer) == "Right, to the digits given."
        assert answer.lstrip("-")[:5] in page.locator("#sheet").inner_text()


def judged(page, answer):
    page.fill("#answer", answer)
    page.press("#answer", "Enter")
    return page.locator("#verdict").text_content()


# A learner's own sums at the worked example with t = (0.9, 0.1), i = (1, 2), η = 2.
EXERCISE = "i1=1&i2=2&t1=0.9&t2=0.1&eta=2"


def learner():
    """Right and wrong values by name: of a weight of the output layer, and of w3, which the slip is about."""

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
            "the spreadsheet’s slip": back * h1 * (1 - h1),
            "sign": -back * slope,
        },
        "w3_next": {
            "Right": w[3] - 2 * back * slope,
            "sign": w[3] + 2 * back * slope,
            "old and new are mixed": w[3],
            "η is forgotten": w[3] - back * slope,
            "the second path is forgotten": w[3] - 2 * d1 * w[6] * slope,
            "the spreadsheet’s slip": w[3] - 2 * back * h1 * (1 - h1),
        },
    }


@pytest.mark.browser
def test_each_mistake_is_named(lesson):
    page = lesson()
    # By the page's own functions: loading it and typing are in the other tests.
    turn = """([address, answer]) => {
        readAddress(address)
        const hidden = [...document.querySelectorAll("data")].some(data => data.textContent === "?")
        document.getElementById("answer").value = answer
        document.getElementById("turn").requestSubmit()
        return [hidden, document.getElementById("verdict").textContent]
    }"""
    for asked, values in learner().items():
        for words, value in values.items():
            address = f"#{EXERCISE}&ask={asked}&row={len(words) % 30}"
            hidden, verdict = page.evaluate(turn, [address, f"{value:.7g}"])
            assert hidden and words in verdict, (asked, words, verdict)
            assert verdict.startswith("Right, to the digits given" if words == "Right" else "Not yet: ")
    assert "no mistake that this page knows" in judged(lesson(f"{EXERCISE}&ask=dE_dw6"), "0.777")


@pytest.mark.browser
def test_notations_and_digits(lesson):
    page = lesson()

    def verdict(text, ask="∂E/∂w5"):
        page.select_option("#ask", ask)
        return judged(page, text)

    for right in ("0.0128808", "1.28808e-2", "0,0128808", "+1.28808E-02", " .01288 ", "0.012880818632"):
        assert verdict(right) == "Right, to the digits given.", right
    assert verdict("0.0128809").startswith("Not yet")
    assert verdict("0.013") == "So far right. Give three digits at least."
    # Three digits of ∂E/∂w3 cannot tell it from the slip, five can.
    assert "cannot tell it from a mistake: that is the spreadsheet’s slip" in verdict("0.000352", "∂E/∂w3")
    assert verdict("0.00035178", "∂E/∂w3") == "Right, to the digits given."
    assert verdict("0.00035187", "∂E/∂w3").startswith("Not yet: that is the spreadsheet’s slip")
    for text, words in {"": "missing", "a lot": "not a number", "NaN": "not a number", "1e309": "smaller"}.items():
        assert verdict(text).startswith("Your value: ") and words in verdict(text)


@pytest.mark.browser
def test_the_asked_value_is_hidden_until_it_is_found(lesson):
    page = lesson("ask=dE_dw5&row=13")
    assert "0.0128808" not in page.locator("main").inner_text()
    assert "0.0128808" not in page.locator("main").inner_html()
    judged(page, "0.01288")
    assert "0.01288081863" in page.locator("#sheet").inner_text()


@pytest.mark.browser
def test_wrong_input_is_a_word_beside_the_field(lesson):
    page = lesson()
    before = page.evaluate(READ)
    for name, text, words in (
        ("w1", "many", "not a number"),
        ("w1", "", "a number is missing"),
        ("w1", "1e309", "must be from -1000 to 1000"),
        ("t2", "NaN", "not a number"),
        ("i1", "-Infinity", "not a number"),
        ("i2", "1.2.3", "not a number"),
        ("η", "0", "η must be above 0"),
        ("η", "-0,5", "η must be above 0"),
        ("η", "1e7", "must be from 0 to 1000000"),
    ):
        page.fill(f"[id='{name}']", text)
        assert words in page.locator(f"[id='{name}-word']").text_content(), (name, text)
        assert page.get_attribute(f"[id='{name}']", "aria-invalid") == "true"
        assert page.evaluate(READ) == before
        page.fill(f"[id='{name}']", "0,25")
        assert page.locator(f"[id='{name}-word']").text_content() == ""
        assert page.evaluate(READ) != before
        page.click("#worked")
        assert page.evaluate(READ) == before


@pytest.mark.browser
def test_extreme_numbers_break_nothing(lesson):
    for settings in (
        {"i1": 1000, "w1": 1000, "w5": -1000},
        {"eta": 1e6, "t1": 1000.0},
        {"i1": 0, "i2": 0, "eta": 1e-300},
    ):
        page = lesson(address(settings))
        page.click("#run100")
        assert page.locator("#sheet").get_by_text(re.compile("NaN|Infinity")).count() == 0
        assert "NaN" not in page.locator("#charts").inner_html()


@pytest.mark.browser
def test_the_address_keeps_it_all(lesson):
    page = lesson()
    page.fill("#w1", "-0,75")
    page.fill("[id='η']", "70")
    page.check("#slip")
    page.click("#run10")
    page.click("#next")
    page.select_option("#ask", "w7 next")
    page.wait_for_function("location.hash.includes('ask=w7_next')")
    said = page.evaluate(READ)
    again = lesson(page.url.partition("#")[2])
    assert again.evaluate(READ) == said
    assert again.locator("#where").text_content() == "loss 11, row 2 of 31"
    assert again.is_checked("#slip") and again.input_value("[id='η']") == "70"
    again.click("#worked")
    again.wait_for_function("location.hash === '#' || location.hash === ''")
    assert again.evaluate(READ) == lesson().evaluate(READ)


@pytest.mark.browser
def test_a_wrong_address_is_told(lesson):
    page = lesson("w1=x&step=0&row=99&nonsense=1&slip=2&w2=0.3")
    told = page.locator("#address").text_content()
    assert all(f"{name}: " in told for name in ("w1", "step", "row", "nonsense", "slip")) and "w2" not in told
    assert page.input_value("#w2") == "0.3" and page.input_value("#w1") == "0.15"


@pytest.mark.browser
def test_by_keyboard_alone(lesson):
    page = lesson()
    for _ in range(17):
        page.keyboard.press("ArrowRight")
    assert page.locator("#caption").text_content().split("\n")[1] == "∂E/∂a_h1 = ∂E/∂o1·w5 + ∂E/∂o2·w7"
    assert lit(page) == {"w5", "w7", "h1", "o1", "o2"}
    assert {"+ 0.0102", "+ 0.0152"} <= set(page.locator(".note").all_text_contents())  # the two addends
    page.keyboard.press("ArrowLeft")
    assert page.locator("#where").text_content() == "loss 1, row 17 of 31"
    for _ in range(15):
        page.keyboard.press("ArrowRight")
    assert page.locator("#where").text_content() == "loss 2, row 1 of 31"

    reached = [""]
    while reached[-1] != "reveal" and len(reached) < 100:  # the last on the page
        page.keyboard.press("Tab")
        active = "e => e.id || e.dataset.part || e.ariaLabel || e.textContent"
        reached.append(page.evaluate(f"({active})(document.activeElement)"))
        if reached[-1] == "w1" and "w1" not in reached[:-1]:  # the weight; the field comes later
            assert lit(page) == {"w1", "i1", "h1", "w5", "w7", "o1", "o2"}
            assert "two ways" in page.locator("#caption").text_content()
        elif reached[-1] == "run10":
            page.keyboard.press("Enter")
            assert page.locator("#where").text_content() == "loss 12, row 1 of 31"
        elif reached[-1] == "slip":
            page.keyboard.press("Space")
            assert page.is_checked("#slip")
        elif reached[-1] == "w1-slider":
            page.keyboard.press("ArrowRight")
            assert page.input_value("#w1") == "0.16"
        elif reached[-1] == "finite difference of ∂E/∂w3":
            page.keyboard.press("Enter")
            assert "apart by" in page.locator("#sheet").inner_text()
    wanted = {*NAMES, *(f"{name}-slider" for name in NAMES), "run1", "run10", "run100", "η", "η-slider"}
    assert all(reached.count(f"w{n}") >= 2 for n in range(1, 9))
    wanted |= {"back", "next", "first", "worked", "slip", "h", "ask", "answer", "reveal", "Check"}
    assert wanted <= set(reached), wanted - set(reached)
    nameless = """[...document.querySelectorAll("input, select, button, [tabindex]")].filter(
        e => !(e.labels?.length || e.ariaLabel || e.textContent.trim())).length"""
    assert page.evaluate(nameless) == 0


def lit(page):
    return set(page.locator(".lit[data-part]").evaluate_all("parts => parts.map(part => part.dataset.part)"))


@pytest.mark.browser
def test_pointing(lesson):
    page = lesson()
    page.hover("[data-weight='5'] text >> nth=0")
    assert lit(page) == {"w5", "h1", "o1"}
    path = page.locator("#caption").text_content()
    assert "∂E/∂a_o1·∂a_o1/∂o1·∂o1/∂w5" in path and "0.01288081863" in path
    page.hover("[data-row='18']")
    assert lit(page) == {"w6", "w8", "h2", "o1", "o2"}
    page.hover("h1")
    assert lit(page) == {"w1", "w2", "i1", "i2", "h1"}  # the current row again


@pytest.mark.browser
def test_finite_differences_show_too_large_and_too_small_an_h(lesson):
    page = lesson()
    page.click("td button >> nth=0")

    def apart(h):
        page.select_option("#h", h)
        return float(page.locator(".difference >> nth=0").text_content().split()[-1])

    assert apart("1e-5") < 1e-10 < 1e-5 < apart("1e-0") and apart("1e-15") > 1e-4
    page.check("#slip")  # the slip is plain beside a finite difference
    page.click("[aria-label='finite difference of ∂E/∂w3']")
    page.select_option("#h", "1e-5")
    assert float(page.locator(".difference").all_text_contents()[6].split()[-1]) == pytest.approx(9.2e-8, rel=0.02)


@pytest.mark.browser
def test_losses_past_two_stay_on_the_charts(lesson):
    page = lesson("eta=1500")
    page.click("#run100")
    inside = """[...document.querySelectorAll("#charts svg")].every(svg => [...svg.children].every(e => {
        const box = e.getBBox(); return box.y > -20 && box.y + box.height < 250 }))"""
    assert page.evaluate(inside)
    assert page.locator("#charts .live").count() == 2 and page.locator("#charts polyline").count() == 14


# The contrast of every text with what lies under it, as WCAG computes it, and that of lit lines with the page.
CONTRAST = """() => {
    const context = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d")
    const light = colour => {
        context.fillStyle = colour
        context.fillRect(0, 0, 1, 1)
        const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map(
            c => c / 255 <= .04045 ? c / 255 / 12.92 : ((c / 255 + .055) / 1.055) ** 2.4)
        return .2126 * r + .7152 * g + .0722 * b
    }
    const ratio = (a, b) => (Math.max(light(a), light(b)) + .05) / (Math.min(light(a), light(b)) + .05)
    const under = e => {
        const fill = e.closest(".node")?.querySelector("circle")
        if (fill) return getComputedStyle(fill).fill
        for (; e; e = e.parentElement) {
            const colour = getComputedStyle(e).backgroundColor
            if (!colour.endsWith(", 0)")) return colour
        }
    }
    const texts = [...document.querySelectorAll("body *")].filter(e => e.checkVisibility() &&
        (e.matches("input") || [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())))
    const ofText = texts.map(e => [ratio(e instanceof SVGElement ? getComputedStyle(e).fill : getComputedStyle(e).color,
        under(e)), e.textContent.slice(0, 40)])
    const lines = [...document.querySelectorAll(".live, .edge line:not(.reach), button")].map(e =>
        [ratio(e.matches("button") ? getComputedStyle(e).borderTopColor : getComputedStyle(e).stroke,
         getComputedStyle(document.body).backgroundColor), "line"])
    return [ofText.sort((a, b) => a[0] - b[0])[0], lines.sort((a, b) => a[0] - b[0])[0], ofText.length]
}"""


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
def test_contrast_and_no_sideways_scrolling(lesson, scheme, width):
    for state in ("row=17", "w1=-0.123456789&w7=-987.654321&t2=-0.3333&eta=123.456&step=7&row=22&slip=1&nonsense=1"):
        page = lesson(state, width, color_scheme=scheme, reduced_motion="reduce")
        page.fill("#w2", "wrong")
        page.locator("td button").evaluate_all("buttons => buttons.forEach(button => button.click())")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        (text, which), (line, _), count = page.evaluate(CONTRAST)
        assert count > 150 and text >= 4.5, which
        assert line >= 3
        assert page.evaluate("getComputedStyle(document.querySelector('.edge line')).transitionDuration") == "0s"


@pytest.mark.browser
def test_prints_on_one_page(lesson):
    page = lesson("row=17")
    assert len(re.findall(rb"/Type\s*/Page\b", page.pdf(prefer_css_page_size=True))) == 1


@pytest.mark.browser
def test_without_javascript_it_says_what_to_do(lesson, browser):
    page = browser.new_page(java_script_enabled=False)
    page.goto(PAGE.as_uri())
    text = page.locator("body").inner_text()
    assert "Switch JavaScript on" in text and "backprop.md" in text
    assert not page.locator("main").is_visible()
    page.close()
    assert "Switch JavaScript on" not in lesson().locator("body").inner_text()


def test_the_page_is_one_file():
    page = PAGE.read_text()
    assert not re.findall(r"https?:|\bsrc=|@import|\bfetch\(|<link(?! rel=\"icon\" href=\"data:)", page)
    assert (DOCS / re.findall(r'<a href="(.+?)"', page)[0]).is_file()
