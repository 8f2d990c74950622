"""The pages in Chromium: what a reader does, without an error in the console or a request to another host.

`make test` installs Chromium and axe-core where it can (as root, with apt-get and npm); without, these are skipped.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import expect, sync_playwright

from batchnorm_client import Client
from batchnorm_service.testing import LocalService
from batchnorm_service.tokens import Scope, add_token

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

expect.set_options(timeout=60_000)  # a busy machine is no fault of the page

AXE = Path(__file__).parents[2] / ".venv-browser/node_modules/axe-core/axe.min.js"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def chromium():
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium is installed: as root, apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Reader:
    """A browser's pages; collects what should not happen.

    Attributes:
        faults: errors of the console and of scripts, and requests to other hosts.
    """

    def __init__(self, chromium, url):
        self.faults = []
        self._url = url
        self._chromium = chromium
        self._contexts = []

    def open(self, path="/ui", width=1280, height=900, dark=False, **options):
        context = self._chromium.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            reduced_motion="reduce",
            **options,
        )
        self._contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: message.type in {"error", "warning"} and self.faults.append(message.text))
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("request", lambda request: self._url in request.url or self.faults.append(request.url))
        page.goto(self._url + path)
        return page

    def close(self):
        for context in self._contexts:
            context.close()


@pytest.fixture
def running():
    """A service in this process; `running(token="t")` is one with settings."""
    started = []

    def start(**settings):
        started.append(LocalService(**settings).start())
        return started[-1]

    yield start
    for service in started:
        service.stop()


@pytest.fixture
def service(running):
    return running(drift_sampling=1.0)


@pytest.fixture
def client(service):
    with service.client() as client:
        yield client


@pytest.fixture
def reader(chromium, service):
    reader = Reader(chromium, service.url)
    yield reader
    reader.close()
    assert reader.faults == []


@pytest.fixture
def layer(client):
    """A layer of eight channels, trained with four batches."""
    layer = client.create_layer("net.bn1", num_features=8)
    for batch in batches(4, 8):
        layer.train(batch)
    return layer


def batches(count, channels, seed=0):
    random = np.random.default_rng(seed)
    return random.normal(np.arange(channels), 2, (count, 16, channels)).astype(np.float32)


def refresh(page):
    """Look for news now, not in five seconds."""
    page.evaluate(
        """new Promise((done) => {
            document.addEventListener("refreshed", done, { once: true });
            document.dispatchEvent(new CustomEvent("refresh"));
        }).then(() => null)"""
    )


def test_the_first_visit(reader):
    page = reader.open("/")
    expect(page).to_have_url(re.compile("/ui$"))
    expect(page.get_by_role("heading", level=1)).to_have_text("No layers yet")
    page.get_by_role("button", name="Load an example").click()
    expect(page.locator("tbody tr")).to_have_count(3)
    expect(page.get_by_role("status").filter(has_text="example is loaded")).to_be_visible()
    page.get_by_role("link", name="example.encoder.bn1").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("example.encoder.bn1")
    expect(page.locator("#channels canvas")).to_have_count(4)
    assert page.title() == "example.encoder.bn1 · Batchnorm"


def test_the_list_by_keyboard(reader, client):
    for name, channels in (("net.a", 4), ("net.b", 2), ("other", 3)):
        client.create_layer(name, num_features=channels)
    page = reader.open()
    page.keyboard.press("/")
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.keyboard.type("net")
    page.keyboard.press("Enter")
    expect(page.locator("tbody tr")).to_have_count(2)
    page.get_by_role("link", name="Channels").focus()
    page.keyboard.press("Enter")
    expect(page.locator("tbody th").first).to_have_text("net.a")
    expect(page.locator("[aria-sort]")).to_have_attribute("aria-sort", "descending")
    page.get_by_role("link", name="net.b").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("net.b")


def test_an_unfinished_search_goes_on_by_itself(reader, client, monkeypatch):
    """Nothing is found among the first names that are read; the last of them all is what is looked for."""
    monkeypatch.setattr("batchnorm_service.ui.search.MAX_READ", 5)
    monkeypatch.setattr("batchnorm_service.ui.search._PAGE", 5)
    for number in range(12):
        client.create_layer(f"l{number:02}", num_features=1)
    page = reader.open("/ui?q=11&match=contains")
    expect(page.locator("tbody tr")).to_have_count(1)
    expect(page.locator("tbody th")).to_have_text("l11")


def test_every_channel(reader, layer):
    page = reader.open("/ui/layers/net.bn1")
    rows = page.locator("#channel-table tbody tr")
    expect(rows).to_have_count(8)
    expected = layer.inspect()
    page.get_by_role("button", name="Mean").click()
    highest = int(np.argmax(expected.running_mean))
    expect(rows.first.locator("th")).to_have_text(str(highest))
    shown = float(rows.first.locator("td").first.inner_text().replace("\N{MINUS SIGN}", "-"))
    assert shown == pytest.approx(expected.running_mean[highest], rel=1e-3)
    page.get_by_label("Go to channel").fill("5")
    page.get_by_role("button", name="Show", exact=True).first.click()
    expect(page.locator("tr.marked th")).to_have_text("5")


def test_drift(reader, layer):
    """Of eval, too; the picture has a row for each of the eight channels, and is drawn again when there is more."""
    page = reader.open("/ui/layers/net.bn1")
    expect(page.locator("#drift-now")).to_contain_text("No drift")
    heat = page.get_by_role("img", name="Heat map")
    expect(heat).to_have_attribute("height", "8")
    for batch in batches(30, 8, seed=4):
        batch[:, 5] += 12
        layer.eval(batch)
    refresh(page)
    expect(page.locator("#drift-now")).to_contain_text("Drift began")
    expect(page.locator("#drift-now")).to_contain_text("Channel 5 is farthest")
    box = heat.bounding_box()
    heat.hover(position={"x": box["width"] - 2, "y": box["height"] * 5.5 / 8})
    expect(page.locator(".heat output")).to_have_text(re.compile("channel 5  z [3-9]"))
    page.get_by_role("button", name="Drift").click()
    expect(page.locator("#channel-table tbody th").first).to_have_text("5")
    page.goto(page.url.replace("/layers/net.bn1", ""))
    expect(page.locator(".spark.drifting")).to_be_visible()


def test_a_batch_before_and_after(reader, layer, tmp_path):
    """From a file, pasted, at random; what the service refuses is said in its words."""
    (batch,) = batches(1, 8, seed=3)
    np.save(tmp_path / "batch.npy", batch)
    page = reader.open("/ui/layers/net.bn1#batch")
    page.set_input_files("#file", tmp_path / "batch.npy")
    about = page.locator("#batch-about")
    expect(about).to_contain_text("batch.npy, shape (16, 8), float32; all channels")
    output = layer.eval(batch).output
    for when, values in (("before", batch), ("after", output)):
        said = page.locator(f"#{when}-about").inner_text().replace("\N{MINUS SIGN}", "-")
        mean, std = map(float, re.findall(r"-?[\d.]+(?:e-?\d+)?", said))
        assert (mean, std) == pytest.approx((values.mean(), values.std()), rel=1e-3, abs=1e-4)
    expect(page.locator("#batch-result canvas")).to_have_count(2)
    page.get_by_label("Or paste JSON").fill(json.dumps(batch.tolist()))
    page.get_by_label("Channel", exact=True).fill("2")
    page.locator("#batch-form").get_by_role("button", name="Show").click()
    expect(about).to_contain_text("JSON, shape (16, 8), float32; channel 2")
    page.get_by_role("button", name="Use random values").click()
    expect(about).to_contain_text("random values, shape (64, 8)")
    assert layer.inspect().num_batches_tracked == 4
    page.get_by_label("Or paste JSON").fill("[[1, 2, 3]]")
    page.locator("#batch-form").get_by_role("button", name="Show").click()
    expect(page.get_by_role("alert")).to_contain_text("must have 8 channels")
    assert [fault for fault in reader.faults if "422" in fault]
    reader.faults.clear()  # Chromium logs each response with 4xx


def test_a_file_of_json_may_be_a_list_as_pasted(reader, layer, tmp_path):
    (tmp_path / "batch.json").write_text(f" {json.dumps(batches(1, 8)[0].tolist())}\n")
    page = reader.open("/ui/layers/net.bn1")
    page.set_input_files("#file", tmp_path / "batch.json")
    expect(page.locator("#batch-about")).to_contain_text("batch.json, shape (16, 8)")


def test_a_file_that_is_too_large_is_not_sent(chromium, running, tmp_path):
    """A browser that is still sending saw a closed connection, and the page said that the service did not answer."""
    service = running(max_body_bytes=2000)
    reader = Reader(chromium, service.url)
    with service.client() as client:
        client.create_layer("net.bn1", num_features=8)
    np.save(tmp_path / "batch.npy", np.zeros((100, 8), np.float32))
    page = reader.open("/ui/layers/net.bn1")
    page.set_input_files("#file", tmp_path / "batch.npy")
    expect(page.get_by_role("alert")).to_contain_text("takes up to 2,000: BATCHNORM_MAX_BODY_BYTES")
    page.get_by_label("Or paste JSON").fill(json.dumps([[0.0] * 8] * 100))
    page.locator("#batch-form").get_by_role("button", name="Show").click()
    expect(page.get_by_role("alert")).to_contain_text("The batch has 4,211 bytes")
    reader.close()
    assert reader.faults == []  # a 413 would be one


def test_a_second_click_sends_nothing(reader, layer):
    """It deleted the pin again, and showed that there is none."""
    layer.pin("release-1")
    page = reader.open("/ui/layers/net.bn1")
    submit = """document.querySelector("#unpin-dialog form").dispatchEvent(
        new SubmitEvent("submit", { bubbles: true, cancelable: true }))"""
    for _ in range(2):
        page.get_by_role("button", name="Delete pin release-1").click()
        assert [page.evaluate(submit) for _ in range(3)] == [True, False, False]
        page.get_by_role("dialog").get_by_role("button", name="Cancel").click()


def test_examples_name_the_folder_of_a_proxy(reader, layer, service):
    page = reader.open("/ui")
    page.route(
        "**/proxied/**",
        lambda route: route.fulfill(response=route.fetch(url=route.request.url.replace("/proxied", ""))),
    )
    page.goto(f"{service.url}/proxied/ui/layers/net.bn1")
    code = page.locator("#calls code")
    for _ in range(2):
        expect(code.first).to_contain_text(f"curl {service.url}/proxied/v1/layers/net.bn1/eval")
        expect(code.last).to_contain_text(f'Client("{service.url}/proxied")')
        refresh(page)
    assert "proxied/proxied" not in page.content()
    page.goto(f"{service.url}/ui/layers/net.bn1")
    expect(code.last).to_contain_text(f'Client("{service.url}")')


def test_reset_rollback_and_pins(reader, layer):
    page = reader.open("/ui/layers/net.bn1")
    page.get_by_role("button", name="Reset", exact=True).click()
    page.get_by_role("button", name="Cancel").click()
    assert layer.inspect().num_batches_tracked == 4
    page.get_by_role("button", name="Pin", exact=True).first.click()
    page.get_by_label("Tag").fill("release-1")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status").filter(has_text="is pinned")).to_be_visible()
    assert [(pin.tag, pin.version) for pin in layer.pins()] == [("release-1", 5)]
    page.get_by_role("button", name="Reset", exact=True).click()
    page.get_by_label("Both").check()
    page.get_by_role("dialog").get_by_role("button", name="Reset").click()
    expect(page.locator("#batches")).to_have_text("0")
    assert "done=" not in page.url
    page.locator("#state-5").get_by_role("button", name="Roll back").click()
    expect(page.get_by_role("dialog")).to_contain_text("Roll back to version 5")
    page.get_by_role("dialog").get_by_role("button", name="Roll back").click()
    expect(page.locator("#batches")).to_have_text("4")
    assert layer.inspect().num_batches_tracked == 4
    page.get_by_role("button", name="Delete pin release-1").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.get_by_role("status").filter(has_text="pin is deleted")).to_be_visible()
    assert layer.pins() == []


def test_a_kept_state_and_its_file(reader, layer):
    before = layer.inspect()
    layer.reset()
    page = reader.open(f"/ui/layers/net.bn1?at={before.version}")
    expect(page.locator("#batches")).to_have_text("4")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == f"net.bn1@{before.version}.safetensors"
    page.get_by_role("link", name="Show the newest").click()
    expect(page.locator("#batches")).to_have_text("0")


def start_of(chart):
    box = chart.bounding_box()
    return box["x"] + 2, box["y"] + 50


def test_a_refresh_keeps_the_place_of_the_reader(reader, layer, client):
    """What is typed, the focus, the scroll position and the zoom of the charts stay; the figures are new."""
    page = reader.open("/ui/layers/net.bn1", height=500)
    expect(page.locator("#channels canvas")).to_have_count(4)
    json_field = page.get_by_label("Or paste JSON")
    json_field.fill("[[1, 2")
    json_field.focus()
    chart = page.locator("[data-chart=mean] .u-over")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + 50, steps=4)
    page.mouse.up()
    page.mouse.move(5, 5)
    json_field.focus()
    scrolled = page.evaluate("scrollY")
    refresh(page)
    (batch,) = batches(1, 8, seed=9)
    layer.train(batch)
    with page.expect_response(re.compile("/values$")):
        refresh(page)
    expect(page.locator("#batches")).to_have_text("5")
    expect(json_field).to_be_focused()
    expect(json_field).to_have_value("[[1, 2")
    assert page.evaluate("scrollY") == scrolled
    chart.scroll_into_view_if_needed()
    page.mouse.move(*start_of(chart))
    expect(page.locator("[data-chart=mean] output")).to_have_text(re.compile("channel [23] "))
    page.goto(page.url.replace("/layers/net.bn1", ""))
    page.get_by_role("link", name="net.bn1").focus()
    refresh(page)
    client.create_layer("net.a", num_features=1)
    refresh(page)
    expect(page.locator("tbody tr")).to_have_count(2)
    expect(page.get_by_role("link", name="net.bn1")).to_be_focused()


def test_a_refresh_of_what_is_known_is_304(reader, layer):
    page = reader.open("/ui/layers/net.bn1")
    refresh(page)
    with page.expect_response(page.url) as response:
        page.evaluate("document.dispatchEvent(new CustomEvent('refresh'))")
    assert response.value.status == 304


def test_login(chromium, running, tmp_path):
    path = tmp_path / "tokens"
    admin, read = (add_token(path, scope, "")[0] for scope in (Scope.ADMIN, Scope.READ))
    service = running(tokens_file=path)
    with service.client(token=admin) as client:
        client.create_layer("net.bn1", num_features=2)
    reader = Reader(chromium, service.url)
    try:
        page = reader.open("/ui/layers/net.bn1")
        expect(page.get_by_role("heading", level=1)).to_have_text("Log in")
        expect(page.get_by_label("Token")).to_be_focused()
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("The service does not know this token.")
        assert [fault for fault in reader.faults if "401" not in fault] == []
        reader.faults.clear()
        page.get_by_label("Token").fill(admin)
        page.get_by_role("button", name="Log in").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("net.bn1")
        assert page.evaluate("document.cookie") == ""
        page.get_by_role("button", name="Pin", exact=True).first.click()
        page.get_by_label("Tag").fill("a")
        page.get_by_role("dialog").get_by_role("button", name="Pin").click()
        expect(page.locator("#pin-a")).to_be_visible()
        page.get_by_role("button", name="Use random values").click()
        expect(page.locator("#batch-about")).to_contain_text("shape (64, 2)")
        page.get_by_role("button", name="Log out").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Log in")
        page.get_by_label("Token").fill(read)
        page.keyboard.press("Enter")
        page.get_by_role("link", name="net.bn1").click()
        expect(page.get_by_role("link", name="Download")).to_be_visible()
        expect(page.get_by_role("button", name=re.compile("Reset|Pin|Roll back"))).to_have_count(0)
        assert reader.faults == []
    finally:
        reader.close()


def test_a_login_that_ends_leads_to_the_login(chromium, running):
    service = running(token="full")
    reader = Reader(chromium, service.url)
    try:
        page = reader.open("/ui")
        page.get_by_label("Token").fill("full")
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", level=1)).to_have_text("No layers yet")
        page.context.clear_cookies()
        page.evaluate("document.dispatchEvent(new CustomEvent('refresh'))")
        expect(page.get_by_role("heading", level=1)).to_have_text("Log in")
    finally:
        reader.close()


def background(page):
    red, green, blue = page.evaluate("getComputedStyle(document.body).backgroundColor").strip("rgb()").split(",")[:3]
    return "dark" if int(red) + int(green) + int(blue) < 200 else "light"


def test_light_and_dark(reader, layer):
    """As the system, or as the reader chose, also on the next page."""
    page = reader.open("/ui/layers/net.bn1", dark=True)
    assert background(page) == "dark"
    button = page.get_by_role("button", name="Theme")
    button.click()
    assert background(page) == "light"
    page.goto(page.url.replace("/layers/net.bn1", ""))
    assert background(page) == "light"
    button.click()
    assert background(page) == "dark"
    button.click()
    page.emulate_media(color_scheme="light")
    assert background(page) == "light"


PATHS = ["/ui", "/ui?q=none", "/ui/layers/net.bn1", "/ui/layers/net.bn1?at=3", "/ui/operations", "/ui/login"]


def settle(page):
    """Wait for charts, where the page has any."""
    if "/layers/" in page.url:
        expect(page.locator("#channels canvas")).to_have_count(4)
        drift = 0 if "?at=" in page.url else 2
        expect(page.locator("#drift canvas")).to_have_count(drift)
    if "/operations" in page.url:
        expect(page.locator(".charts canvas")).to_have_count(4)


@pytest.mark.parametrize("path", PATHS)
def test_on_a_telephone_nothing_is_wider_than_the_screen(reader, layer, path):
    layer.pin("a")
    layer.reset()
    page = reader.open(path.replace("at=3", "at=a"), width=375, height=700)
    settle(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    for button in page.get_by_role("button").all():
        assert not button.is_visible() or button.bounding_box()["height"] >= 24  # WCAG 2.2, 2.5.8


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("path", PATHS)
def test_axe_finds_no_serious_fault(reader, layer, path, dark):
    if not AXE.exists():
        pytest.skip("axe-core is not installed: make test does it where there is npm")
    layer.pin("a")
    layer.reset()
    page = reader.open(path.replace("at=3", "at=a"), dark=dark)
    settle(page)
    if path == "/ui/layers/net.bn1":
        page.get_by_role("button", name="Use random values").click()
        expect(page.locator("#batch-result canvas")).to_have_count(2)
    found = check(page)
    if path == "/ui/layers/net.bn1":
        page.get_by_role("button", name="Reset", exact=True).click()
        found += check(page)
    assert found == []


def check(page):
    page.evaluate(AXE.read_text())
    result = page.evaluate("axe.run()")
    assert result["passes"]
    return [
        (each["id"], each["nodes"][0]["html"], each["nodes"][0]["failureSummary"])
        for each in result["violations"]
        if each["impact"] in {"serious", "critical"}
    ]


def test_operations(reader, layer):
    page = reader.open("/ui/operations")
    expect(page.locator(".charts canvas")).to_have_count(4)
    row = page.locator("#routes tr", has_text="POST /v1/layers/{name}/train")
    expect(row.locator("td").first).to_have_text("4")
    for batch in batches(3, 8):
        layer.train(batch)
    expect(row.locator("td").first).to_have_text("7")
    expect(page.locator("[data-gauge=workers]")).to_have_text("1")


def test_a_service_that_is_away(reader, layer, service):
    page = reader.open("/ui/layers/net.bn1")
    expect(page.locator("#channels canvas")).to_have_count(4)
    service.stop()
    page.evaluate("document.dispatchEvent(new CustomEvent('refresh'))")
    expect(page.locator("#late")).to_have_text("Reconnecting")
    assert all("ERR_CONNECTION" in fault or "ERR_EMPTY" in fault or "ERR_SOCKET" in fault for fault in reader.faults)
    reader.faults.clear()


def test_a_layer_of_4096_channels(reader, client):
    """Quick because little is sent and built, whatever the number: `python -m benchmarks.page` measures it."""
    layer = client.create_layer("wide", num_features=4096)
    for batch in batches(2, 4096):
        layer.train(batch)
    page = reader.open("/ui/layers/wide")
    expect(page.locator("#channel-table tbody tr")).to_have_count(12)
    assert page.evaluate("document.querySelectorAll('*').length") < 1000
    page.get_by_role("button", name="Mean").click()
    expect(page.locator("#channel-table tbody th").first).to_have_text(
        f"{int(np.argmax(layer.inspect().running_mean)):,}"
    )


def test_a_layer_with_more_channels_than_are_drawn_one_by_one(reader, client):
    client.create_layer("vast", num_features=100_000)
    page = reader.open("/ui/layers/vast")
    expect(page.locator("#channels canvas")).to_have_count(4)
    expect(page.locator("#channel-table")).to_be_hidden()


def test_code_can_be_copied(reader, layer):
    page = reader.open("/ui/layers/net.bn1", permissions=["clipboard-read", "clipboard-write"])
    page.locator("#calls").get_by_role("button", name="Copy").last.click()
    expect(page.locator("#calls").get_by_role("button", name="Copied")).to_be_visible()
    code = page.evaluate("navigator.clipboard.readText()")
    assert 'client.layer("net.bn1")' in code


def test_the_python_lines_of_a_page_work(reader, layer, tmp_path, monkeypatch):
    np.save(tmp_path / "batch.npy", batches(1, 8)[0])
    monkeypatch.chdir(tmp_path)
    page = reader.open("/ui/layers/net.bn1")
    code = page.locator("#calls pre code").last.inner_text()
    namespace = {}
    exec(code, namespace)
    assert isinstance(namespace["client"], Client)
    namespace["client"].close()
    assert layer.inspect().num_batches_tracked == 0  # trained, pinned, rolled back and reset
    assert [pin.tag for pin in layer.pins()] == ["release-1"]
