"""The report in a real browser: from disk, without network, by mouse and keyboard, with hostile names."""

import json
import os
import re
import select
import shutil
import subprocess
import time
from base64 import b64decode

import numpy as np
import pytest

from mice.clustering.report import Findings, write_report

BROWSERS = "chromium chromium-browser google-chrome chrome".split()
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--remote-debugging-pipe",
]


class Browser:
    "Chromium, controlled by its DevTools protocol: JSON through two pipes, messages ended by a zero byte."

    def __init__(self, program, folder):
        script = 'exec "$@" 3<&0 4>&1 0</dev/null 1>&2'
        words = ["sh", "-c", script, "sh", program, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0)
        self.sent, self.rest, self.events, self.session = 0, b"", [], None
        targets = self.ask("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self.session = self.ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        offline = dict(offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1)
        self.ask("Network.emulateNetworkConditions", **offline)

    def ask(self, method, **params):
        "Send a command and return its result; events that arrive meanwhile are kept."
        self.sent += 1
        message = dict(id=self.sent, method=method, params=params)
        if self.session:
            message["sessionId"] = self.session
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.sent:
            self.events.append(answer)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def receive(self, timeout=60):
        while b"\0" not in self.rest:
            assert select.select([self.process.stdout], [], [], timeout)[0], "the browser does not answer"
            part = os.read(self.process.stdout.fileno(), 1 << 20)
            assert part, "the browser has exited"
            self.rest += part
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def open(self, path, width=1200, height=900, scheme="light", mobile=False):
        self.events.clear()
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        self.ask("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value=scheme)])
        self.ask("Page.navigate", url=path.as_uri())
        self.wait("document.readyState === 'complete' && document.getElementById('data') && chart.width > 1")
        return self

    def run(self, script):
        "The value of an expression in the page."
        result = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, script, seconds=20):
        "Wait until an expression is true; it may fail until then."
        end = time.monotonic() + seconds
        while not self.ask("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value"):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.02)

    def next_frame(self):
        "Wait until everything that was requested is drawn."
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def key(self, name, **more):
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=name, **more)

    def mouse(self, kind, x, y, pressed=False):
        button = "left" if pressed or kind == "mouseReleased" else "none"
        more = dict(button=button, buttons=1 if pressed else 0, clickCount=1)
        self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def dot(self, i):
        "Where the dot of an image is on the screen, once the map is in view."
        self.run("chart.scrollIntoView()")
        self.next_frame()
        box = "chart.getBoundingClientRect()"
        return self.run(f"[{box}.x + screenX({i}), {box}.y + screenY({i})]")

    def complaints(self):
        "Exceptions, console errors, policy violations, and requests for anything but the file itself."
        self.run("1")
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
        wrong = [event for event in self.events if event["method"] in kinds]
        asked = [event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        urls = [params["request"]["url"][:80] for params in asked]
        return wrong + [url for url in urls if not url.startswith(("file:", "data:"))]

    def close(self):
        self.process.stdin.close()
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not program:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    browser = Browser(program, tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


HOSTILE = [
    "<script>hacked = 1</script>.png",
    "</script><script>hacked = 2</script>.png",
    '"><img src=x onerror="hacked = 3">.png',
    "' autofocus onfocus='hacked = 4.png",
    "{{ 7 * 7 }}.png",
    "<!--.png",
    "&lt;b&gt;.png",
    "\\u003c \u2028.png",
    os.fsdecode(b"caf\xe9.png"),
    "right\u202eto left.png",
    "a\nb.png",
]


@pytest.fixture(scope="module")
def findings():
    "Sixty squares, each of a colour of its own, in three groups, under names that nobody should trust."
    M, size, rng = 60, 32, np.random.default_rng(0)
    levels = [(60 + 60 * (i % 4), 60 + 60 * (i // 4 % 4), 60 + 60 * (i // 16)) for i in range(M)]
    images = np.array(levels, np.uint8)[:, None, None].repeat(size, 1).repeat(size, 2)  # (M, size, size, 3)
    clusters = np.arange(M) % 3
    embeddings = np.eye(3, 8, dtype=np.float32)[clusters] + rng.normal(0, 0.2, (M, 8)).astype(np.float32)
    images[-1], embeddings[-1] = images[3], embeddings[3] + 0.01  # a copy, in another cluster
    names = HOSTILE + [f"{i:03}.png" for i in range(len(HOSTILE), M)]
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>hacked = 5</script></svg>'
    return Findings(
        images=images,
        clusters=clusters,
        confidence=rng.uniform(0.4, 1, M),
        runner_up=(clusters + 1) % 3,
        files=[f"/secret/folder/{name}" for name in names],
        embeddings=embeddings,
        facts={"Images <b>": "60 & more"},
        notes=[HOSTILE[0]],
        skipped=[(HOSTILE[1], HOSTILE[2]), ("/secret/folder/torn.jpg", "cut short")],
        history=[dict(epoch=i, loss=7 - i / 10, lr=1.0, sizes=[20, 20, 20]) for i in range(1, 9)],
        extra={"A figure </h3>": svg},
    )


@pytest.fixture(scope="module")
def path(findings, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, findings, title="Sixty <i>squares</i>")
    return path


LOWEST_CONTRAST = """(() => {
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const linear = v => v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b) + 0.05;
  const transparent = e => numbers(getComputedStyle(e).backgroundColor)[3] === 0;
  const kinds = 'h1,h2,h3,h4,p,a,b,small,button,.chip,td,th,li,label,summary,caption';
  return [...document.querySelectorAll(kinds)].map(e => {
    let under = e;
    while (under !== document.body && transparent(under)) under = under.parentElement;
    const colours = [getComputedStyle(e).color, getComputedStyle(under).backgroundColor];
    const [a, b] = colours.map(colour => light(numbers(colour)));
    return [Math.max(a, b) / Math.min(a, b), e.outerHTML.slice(0, 80)];
  }).sort((a, b) => a[0] - b[0])[0];
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_opens_from_disk_without_network(browser, path, scheme):
    "No request, no error, no complaint; and its text can be read."
    browser.open(path, scheme=scheme)
    browser.run("byId('pictures').click()")
    browser.next_frame()
    assert browser.complaints() == []
    assert browser.run("document.title") == "Sixty <i>squares</i>"
    ratio, where = browser.run(LOWEST_CONTRAST)
    assert ratio >= 4.5, where
    assert (browser.run("rgb('--paper')[0]") > 240) == (scheme == "light")


def test_map_by_mouse(browser, path, findings):
    browser.open(path)
    order = np.lexsort((-findings.confidence, findings.clusters))
    for i in range(0, 60, 7):
        browser.mouse("mouseMoved", *browser.dot(i))
        assert browser.run("chosen") == i, "the nearest dot is the one pointed at"
        caption, name = browser.run("[byId('caption').textContent, data.names[chosen]]")
        assert caption.startswith(f"{name}cluster {findings.clusters[order[i]]},")
        browser.wait("byId('picture').dataset.drawn === String(chosen)")
        rgba = browser.run("[...byId('picture').getContext('2d').getImageData(96, 96, 1, 1).data]")
        difference = np.abs(np.array(rgba[:3]) - findings.images[order[i], 0, 0])
        assert difference.max() < 12, "the picture is that of the image"
    x, y = browser.dot(5)
    browser.mouse("mousePressed", x, y, pressed=True)
    browser.mouse("mouseReleased", x, y)
    assert browser.run("byId('announcement').textContent").startswith(browser.run("data.names[5]"))
    browser.run("byId('in').click()")
    assert browser.run("zoom") == 1.5
    assert np.allclose(browser.dot(5), (x, y), atol=1), "zooming keeps the chosen image where it is"
    browser.mouse("mousePressed", x, y, pressed=True)
    browser.mouse("mouseMoved", x + 40, y + 10, pressed=True)
    browser.mouse("mouseReleased", x + 40, y + 10)
    assert np.allclose(browser.dot(5), (x + 40, y + 10), atol=1), "a drag moves the map"
    browser.run("document.querySelector('#clusters .strip a').click()")
    browser.wait("chosen === 0 && document.activeElement === chart")
    browser.run("document.querySelector('[data-k=\"1\"]').click(), choose(-1), chart.focus()")
    browser.key("PageDown")
    assert browser.run("cluster[chosen]") == 1, "a cluster can be singled out"


def test_reads_well_without_eyes(browser, path):
    browser.open(path)
    levels = browser.run("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => Number(h.tagName[1]))")
    steps = zip(levels, levels[1:], strict=False)
    assert levels.count(1) == 1 and levels[0] == 1 and all(b <= a + 1 for a, b in steps), levels
    assert browser.run("document.documentElement.lang") == "en"
    nodes = [node for node in browser.ask("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    roles = {"button", "link", "image", "searchbox", "application"}
    named = []
    for node in nodes:
        if "name" in node and node.get("role", {}).get("value") in roles:
            named.append((node["role"]["value"], node["name"]["value"]))
    assert {role for role, _ in named} == roles and len(named) > 60
    assert all(name.strip() for _, name in named), [role for role, name in named if not name.strip()]


def test_everything_by_keyboard(browser, path):
    browser.open(path)
    focus = "(e => e.id || e.dataset.i || e.dataset.k || e.tagName)(document.activeElement)"
    stops = []
    while "BODY" not in stops and len(stops) < 60:
        browser.key("Tab", code="Tab", windowsVirtualKeyCode=9)
        stops.append(browser.run(focus))
    slots = "[...document.querySelectorAll('.strip')].map(strip => [...strip.children].map(a => a.dataset.i))"
    strips = browser.run(slots)
    assert {"in", "out", "all", "pictures", "find", "chart", "0", "1", "2", "SUMMARY", "BODY"} <= set(stops)
    assert {strip[0] for strip in strips} <= set(stops), "one stop for each row of pictures"
    browser.run("document.querySelector('#clusters .strip a').focus()")
    for slot in strips[0][1:]:
        browser.key("ArrowRight")
        assert browser.run(focus) == slot, "arrow keys go through a row"

    browser.run("chart.focus(), choose(0, true)")
    directions = dict(ArrowRight=("x", 1), ArrowDown=("y", 1), ArrowLeft=("x", -1), ArrowUp=("y", -1))
    moves, heard = 0, set()
    for name, (axis, sign) in [*directions.items()] * 3:
        before = browser.run("chosen")
        browser.key(name)
        moved = browser.run(f"{axis}[chosen] - {axis}[{before}]")
        assert sign * moved >= 0, f"{name} goes the wrong way"
        moves += moved != 0
        heard.add(browser.run("byId('announcement').textContent"))
    assert moves > 3 and len(heard) > 3 and all(": cluster" in text for text in heard)
    browser.run("choose(0, true)")
    for i in range(1, 60):
        browser.key("PageDown")
        assert browser.run("chosen") == i, "Page Down reaches every image"
    browser.key("Home")
    assert browser.run("cluster[chosen] === 2 && cluster[chosen - 1] === 1")
    browser.key("+", text="+")
    assert browser.run("zoom") == 1.5
    browser.key("0", text="0")
    assert browser.run("zoom") == 1
    browser.run("byId('find').focus()")
    for letter in "033":
        browser.key(letter, text=letter)
    browser.key("Enter")
    assert browser.run("data.names[chosen]") == "033.png"


def test_hostile_names_are_harmless(browser, path):
    "Names stay text; and markup that got in all the same would neither run nor reach anything."
    browser.open(path)
    assert browser.run("typeof hacked") == "undefined"
    assert browser.run("document.scripts.length") == 2
    assert browser.run("document.querySelectorAll('[onerror], [onfocus], main i, td img').length") == 0
    names = set(browser.run("data.names"))
    assert set(HOSTILE[:7]) <= names, "what can be printed is shown as it is"
    assert not set("".join(names)) & set("\n\u2028\u202e\udce9"), "the rest is escaped"
    assert "cut short" in browser.run("document.querySelector('#skipped').textContent")
    assert "secret" not in path.read_text(), "the author's folders are not disclosed"

    evil = "<img src=data:, onerror='window.hacked = 1'><a id=evil onclick='window.hacked = 1'>x</a>"
    browser.run(f'document.body.insertAdjacentHTML("beforeend", "{evil}")')
    browser.run("byId('evil').click()")
    browser.run("new Image().src = 'http://127.0.0.1/x.png'")
    assert browser.run("fetch('http://127.0.0.1/').then(() => 'reached', error => error.name)") == "TypeError"
    browser.next_frame()
    assert browser.run("typeof hacked") == "undefined"
    refused = str(browser.complaints())
    policies = ("script-src", "default-src", "img-src")
    assert all(policy in refused for policy in policies), "refused by the policy, not for want of a network"


@pytest.mark.parametrize("width", [360, 800])
def test_fits_narrow_screens(browser, path, width):
    browser.open(path, width=width, height=700, mobile=True)
    assert browser.run("document.documentElement.scrollWidth") <= width
    browser.mouse("mouseMoved", *browser.dot(3))
    assert browser.run("chosen") == 3


def test_prints(browser, path):
    "Ink on white even in dark mode; what only a screen can do is left out, everything else is there."
    browser.open(path, scheme="dark")
    pdf = b64decode(browser.ask("Page.printToPDF", printBackground=False)["data"])
    assert pdf.startswith(b"%PDF") and 2 <= len(re.findall(rb"/Type ?/Page\b", pdf)) <= 8
    browser.ask("Emulation.setEmulatedMedia", media="print")
    browser.next_frame()
    assert browser.run("chart.getContext('2d').getImageData(1, 1, 1, 1).data[0]") > 240, "a light map too"
    shown = "[...document.querySelectorAll('{}')].filter(e => e.checkVisibility()).length"
    assert browser.run(shown.format("nav, .tools, details, #chosen")) == 0
    expected = {"h1": 1, "#chart": 1, "article": 3, ".pair": 1, ".curve": 1, "#skipped tbody tr": 2}
    for kind, count in expected.items():
        assert browser.run(shown.format(kind)) == count, kind
    assert min(browser.run("rgb('--paper')")) == 255 and max(browser.run("rgb('--text')")) < 50


def test_fits_into_its_budget(tmp_path):
    "Noise, which does not compress: the thumbnails get smaller until the file fits."
    M, rng = 300, np.random.default_rng(0)
    images, clusters = rng.integers(0, 256, (M, 32, 32, 3), np.uint8), rng.integers(0, 5, M)
    embeddings = rng.normal(size=(M, 8)).astype(np.float32)
    findings = Findings(images, clusters, rng.uniform(0.1, 1, M), (clusters + 1) % 5, [], embeddings)
    write_report(tmp_path / "noise.html", findings, max_bytes=300_000)
    assert 200_000 < (tmp_path / "noise.html").stat().st_size <= 300_000


@pytest.mark.long
def test_fifty_thousand_images(tmp_path, browser, record):
    "Noise, which no codec makes small, under long names: the file stays small, and the page answers at once."
    M, rng = 50_000, np.random.default_rng(0)
    smooth = rng.integers(0, 256, (5000, 8, 8, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    images = np.concatenate([smooth + rng.integers(0, 30, smooth.shape, np.uint8) for _ in range(10)])
    clusters = rng.integers(0, 10, M)
    embeddings = (np.eye(10, 64)[clusters] + rng.normal(0, 0.3, (M, 64))).astype(np.float32)
    files = [f"/photos/{i % 7}/{rng.bytes(16).hex()}.jpg" for i in range(M)]
    findings = Findings(images, clusters, rng.uniform(0.1, 1, M), (clusters + 1) % 10, files, embeddings)
    path, started, cpu = tmp_path / "large.html", time.perf_counter(), time.process_time()
    write_report(path, findings)
    seconds, cpu, size = time.perf_counter() - started, time.process_time() - cpu, path.stat().st_size
    started = time.perf_counter()
    browser.open(path)
    browser.next_frame()
    opened = time.perf_counter() - started
    assert browser.complaints() == []  # later the browser advises against the reading of pixels below

    def milliseconds(script, times):
        "Mean time of an expression in which i counts the repetitions."
        loop = f"const t = performance.now(); for (let i = 0; i < {times}; i++) {{ {script}; }}"
        return browser.run(f"(() => {{ {loop} return performance.now() - t; }})()") / times

    search = milliseconds("nearest(i, i, 1e9, squaredDistance)", 50)
    drawn = milliseconds("redraw(); draw(); pen.getImageData(0, 0, 1, 1)", 10)
    marked = milliseconds("choose(i, false); draw(); pen.getImageData(0, 0, 1, 1)", 10)
    written = f"{size / 1e6:.1f} MB, made in {seconds:.0f} s ({cpu:.0f} s of CPU), opened in {opened:.1f} s"
    answers = f"a dot found in {search:.2f} ms and marked in {marked:.1f} ms, the map drawn in {drawn:.0f} ms"
    passed = size <= 20e6 and cpu < 120 and search < 5 and marked < 50 and drawn < 1000
    demand = "a report of 50,000 images has at most 20 MB, takes at most 2 minutes of one core"
    record(f"{demand}, and answers at once", f"{written}, {answers}", int(passed), 1)
