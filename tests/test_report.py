"""The report in a real browser: from disk, without a network, by mouse and by keyboard, with names nobody should trust."""

import io
import json
import os
import select
import shutil
import subprocess
import time
from base64 import b64decode

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from mice.estimator import MiCE
from mice.report import Findings, findings_of, near_duplicates, write_report

BROWSERS = "chromium chromium-browser google-chrome chrome".split()
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --remote-debugging-pipe".split()


class Browser:
    "Chromium, spoken to through a pair of pipes in its DevTools protocol: JSON, each message ended by a zero byte."

    def __init__(self, program, folder):
        words = ["sh", "-c", 'exec "$@" 3<&0 4>&1 0</dev/null 1>&2', "sh", program, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)
        self.sent, self.rest, self.events, self.session = 0, b"", [], None
        target = next(t for t in self.ask("Target.getTargets")["targetInfos"] if t["type"] == "page")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.ask(f"{domain}.enable")
        self.ask("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1)

    def ask(self, method, **params):
        self.sent += 1
        message = dict(id=self.sent, method=method, params=params) | (dict(sessionId=self.session) if self.session else {})
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.sent:
            self.events.append(answer)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def receive(self, patience=60):
        while b"\0" not in self.rest:
            assert select.select([self.process.stdout], [], [], patience)[0], "the browser does not answer"
            part = os.read(self.process.stdout.fileno(), 1 << 20)
            assert part, "the browser has gone"
            self.rest += part
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def open(self, path, width=1200, height=900, scheme="light", mobile=False):
        self.events.clear()
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
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
        end = time.monotonic() + seconds
        while not self.ask("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value"):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.02)

    def frame(self):
        "Let what was asked for be drawn."
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def key(self, name, **more):
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=name, **more)

    def mouse(self, kind, x, y, buttons=0):
        self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left" if buttons or kind == "mouseReleased" else "none", buttons=buttons, clickCount=1)

    def picture(self, whole=False):
        return b64decode(self.ask("Page.captureScreenshot", captureBeyondViewport=whole)["data"])

    def complaints(self):
        "Exceptions, console errors, policy violations, and requests for anything but the file itself and what it carries."
        self.run("1")
        wrong = [e for e in self.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")]
        asked = [e["params"]["request"]["url"][:80] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return wrong + [url for url in asked if not url.startswith(("file:", "data:"))]

    def close(self):
        self.process.stdin.close()
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not program:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed, so no page can be opened")
    it = Browser(program, tmp_path_factory.mktemp("browser"))
    yield it
    it.close()


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


def painted(n=60, size=32) -> Findings:
    "Squares of one colour each, in three groups; a picture can be told by its colour. The names are those of nobody's friends."
    rng = np.random.default_rng(0)
    colours = np.array([(60 + 60 * (i % 4), 60 + 60 * (i // 4 % 4), 60 + 60 * (i // 16)) for i in range(n)], np.uint8)  # (n, 3)
    clusters, images = np.arange(n) % 3, np.broadcast_to(colours[:, None, None], (n, size, size, 3)).copy()
    embeddings = np.eye(3, 8, dtype=np.float32)[clusters] + rng.normal(0, 0.2, (n, 8)).astype(np.float32)
    if n > 3:
        images[-1], embeddings[-1] = images[3], embeddings[3] + 0.01  # a copy, in another cluster
    files = [f"/secret/folder/{name}" for name in HOSTILE] + [f"/secret/folder/{i:03}.png" for i in range(len(HOSTILE), n)]
    more = dict(facts={"Images <b>": "60 & more"}, notes=[HOSTILE[0]], skipped=[(HOSTILE[1], HOSTILE[2]), ("/secret/folder/torn.jpg", "cut short")])
    history = [dict(epoch=i, loss=7 - i / 10, lr=1.0, sizes=[20, 20, 20]) for i in range(1, 9)]
    extra = {"A figure </h3>": '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>hacked = 5</script></svg>'}
    return Findings(images, clusters, rng.uniform(0.4, 1, n), (clusters + 1) % 3, files, embeddings, history=history, extra=extra, **more)


@pytest.fixture(scope="module")
def findings():
    return painted()


@pytest.fixture(scope="module")
def path(findings, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, findings, title="Sixty <i>squares</i>")
    return path


PLACE = "(() => {{ const box = chart.getBoundingClientRect(); return [box.x + screenX({0}), box.y + screenY({0})]; }})()"


def look_at(browser, i):
    "Scroll the map into view and say where a dot is."
    browser.run("chart.scrollIntoView()")
    browser.frame()
    return browser.run(PLACE.format(i))


def middle_of_picture(browser):
    browser.wait("byId('picture').dataset.drawn === String(chosen)")
    return browser.run("[...byId('picture').getContext('2d').getImageData(96, 96, 1, 1).data].slice(0, 3)")


def test_opens_without_network_and_without_complaint(browser, path):
    browser.open(path)
    browser.run("byId('pictures').click()")
    browser.frame()
    assert browser.complaints() == []
    assert browser.run("document.title") == "Sixty <i>squares</i>"


def test_complaints_are_heard(browser, path, tmp_path):
    "What the test before would say of a page that errs or asks for something."
    bad = tmp_path / "bad.html"
    text = path.read_text().replace("default-src 'none'; ", "").replace("img-src data:", "img-src *")
    bad.write_text(text.replace("<main>", "<main><img alt='' src='http://mice.example/x.png'>"))
    assert any("mice.example" in str(item) for item in browser.open(bad).complaints())
    bad.write_text(path.read_text().replace('"use strict";', '"use strict"; '))
    browser.events.clear()
    browser.ask("Page.navigate", url=bad.as_uri())
    browser.wait("document.readyState === 'complete'")
    assert "Content Security Policy" in str(browser.complaints()), "a changed script must not run"


def test_pointing_at_a_dot_shows_its_name_and_picture(browser, path, findings):
    browser.open(path)
    order = np.lexsort((-findings.confidence, findings.clusters))
    for i in range(0, 60, 7):
        browser.mouse("mouseMoved", *look_at(browser, i))
        assert browser.run("chosen") == i, "the nearest dot is the one pointed at"
        row = order[i]
        assert browser.run("byId('caption').firstChild.textContent") == browser.run(f"data.names[{i}]")
        assert f"cluster {findings.clusters[row]}," in browser.run("byId('caption').textContent")
        assert np.abs(np.array(middle_of_picture(browser)) - findings.images[row, 0, 0]).max() < 12, "the picture is that of the image"
    names = browser.run("data.names")
    assert names[list(order).index(30)] == "030.png", "names begin at the shared folder"
    browser.mouse("mouseMoved", *np.add(browser.run("(() => { const b = chart.getBoundingClientRect(); return [b.x, b.y]; })()"), 2))
    assert browser.run("chosen") == i, "pointing at nothing chooses nothing"


def test_a_click_is_announced_and_a_drag_moves_the_map(browser, path):
    browser.open(path)
    x, y = look_at(browser, 5)
    browser.mouse("mousePressed", x, y, buttons=1)
    browser.mouse("mouseReleased", x, y)
    assert browser.run("byId('said').textContent").startswith(browser.run("data.names[5]"))
    browser.run("byId('in').click()")
    browser.frame()
    assert np.allclose(browser.run(PLACE.format(5)), (x, y), atol=1), "zooming keeps the chosen image where it is"
    browser.mouse("mousePressed", x, y, buttons=1)
    browser.mouse("mouseMoved", x + 40, y + 10, buttons=1)
    browser.mouse("mouseReleased", x + 40, y + 10)
    browser.frame()
    assert np.allclose(browser.run(PLACE.format(5)), (x + 40, y + 10), atol=1)
    browser.run("byId('all').click()")
    assert browser.run("[zoom, left, top_]") == [1, 0.5, 0.5]


def test_keys_walk_through_the_dots(browser, path):
    browser.open(path).run("chart.focus()")
    heard = set()
    for name, axis, sign in 3 * [("ArrowRight", "x", 1)] + 3 * [("ArrowDown", "y", 1)] + 4 * [("ArrowLeft", "x", -1)] + 4 * [("ArrowUp", "y", -1)]:
        before = browser.run("chosen")
        browser.key(name)
        after = browser.run("chosen")
        if 0 <= before != after:
            assert sign * browser.run(f"{axis}[{after}] - {axis}[{before}]") > 0, f"{name} goes the wrong way"
        heard.add(browser.run("byId('said').textContent"))
    assert len(heard) > 3 and all(": cluster" in words for words in heard)
    browser.run("choose(0, true)")
    visited = [browser.run("chosen")]
    for _ in range(59):
        browser.key("PageDown")
        visited.append(browser.run("chosen"))
    assert visited == list(range(60)), "Page Down reaches every image"
    browser.key("Home")
    assert browser.run("chosen === 0 || cluster[chosen - 1] !== cluster[chosen]")
    browser.key("+", text="+")
    assert browser.run("zoom") == 1.5
    browser.key("0", text="0")
    assert browser.run("zoom") == 1


def test_clusters_can_be_singled_out_and_files_found(browser, path):
    browser.open(path).run("document.querySelector('[data-k=\"1\"]').click(), choose(-1), chart.focus()")
    browser.key("PageDown")
    assert browser.run("cluster[chosen]") == 1
    browser.run("document.querySelector('[data-k=\"1\"]').click()")
    browser.run("byId('find').focus()")
    for letter in "033":
        browser.key(letter, text=letter)
    browser.key("Enter")
    assert browser.run("data.names[chosen]") == "033.png"
    browser.run("document.querySelector('#clusters .strip a').click()")
    browser.wait("chosen === 0 && document.activeElement === chart")


def test_hostile_names_are_harmless(browser, path, findings):
    browser.open(path)
    assert browser.run("typeof hacked") == "undefined"
    assert browser.run("document.scripts.length") == 2
    assert browser.run("document.querySelectorAll('[onerror], [onfocus], main i, td img, h3 ~ svg script').length") == 0
    names = set(browser.run("data.names"))
    assert set(HOSTILE[:7]) <= names, "what can be shown is shown as it is"
    assert not any(letter in name for name in names for letter in "\n\u2028\u202e\udce9"), "what cannot be shown is spelled out"
    assert "cut short" in browser.run("document.querySelector('#skipped').textContent")
    assert "secret" not in path.read_text(), "the folders of the author are nobody's business"


def test_the_second_wall_holds(browser, path):
    "Markup that got in would still neither run nor reach anything."
    browser.open(path)
    browser.run("document.body.insertAdjacentHTML('beforeend', '<img src=data:, onerror=\"window.hacked = 1\"><a id=evil onclick=\"window.hacked = 1\">x</a>')")
    browser.run("byId('evil').click()")
    assert browser.run("typeof hacked") == "undefined"
    assert browser.run("fetch('http://127.0.0.1/').then(() => 'reached', error => error.name)") == "TypeError"
    browser.run("new Image().src = 'http://127.0.0.1/x.png'")
    browser.frame()
    refused = str(browser.complaints())
    assert all(words in refused for words in ("script-src", "default-src", "img-src")), "what is refused is refused by the policy, not for want of a network"


def test_reads_well_without_eyes(browser, path):
    browser.open(path)
    levels = browser.run("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => Number(h.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:])), levels
    assert browser.run("['header', 'nav', 'main'].every(name => document.querySelectorAll(name).length === 1)")
    assert browser.run("document.documentElement.lang") == "en"
    assert browser.run("(ids => ids.length === new Set(ids).size)([...document.querySelectorAll('[id]')].map(e => e.id))")
    nodes = [n for n in browser.ask("Accessibility.getFullAXTree")["nodes"] if not n["ignored"]]
    named = [(n["role"]["value"], n["name"]["value"]) for n in nodes if n.get("role", {}).get("value") in ("button", "link", "image", "searchbox", "application", "region")]
    assert len(named) > 60 and all(name.strip() for _, name in named), [role for role, name in named if not name.strip()]
    assert {"application", "image", "searchbox", "button", "link"} <= {role for role, _ in named}
    assert browser.run("document.querySelectorAll('[role=group]:not([aria-label])').length") == 0
    assert "in different clusters" in browser.run("document.querySelector('.pairs').textContent"), "the one copy is shown"
    assert browser.run("byId('said').getAttribute('aria-live')") == "polite"


def test_everything_is_reached_by_keyboard(browser, path):
    browser.open(path)
    here = "(e => e === document.body ? '' : e.id || e.dataset.i || e.dataset.k || e.tagName + e.textContent.trim())(document.activeElement)"
    stops = []
    while len(stops) < 200:
        browser.key("Tab", code="Tab", windowsVirtualKeyCode=9)
        stops.append(browser.run(here))
        if stops[-1] == "":
            break
    strips = browser.run("[...document.querySelectorAll('.strip')].map(s => [...s.querySelectorAll('a')].map(a => a.dataset.i))")
    assert {"in", "out", "all", "pictures", "find", "chart", "0", "1", "2", "SUMMARYKeys"} <= set(stops)
    assert all(strip[0] in stops for strip in strips) and len(stops) < 50, "one stop for each row of pictures"
    browser.run("document.querySelector('#clusters .strip a').focus()")
    reached = [browser.run("document.activeElement.dataset.i")]
    for _ in strips[0][1:]:
        browser.key("ArrowRight")
        reached.append(browser.run("document.activeElement.dataset.i"))
    assert reached == strips[0]


CONTRASTS = """[...document.querySelectorAll('h1,h2,h3,h4,p,a,b,small,button,.chip,td,th,li,label,summary,caption,figcaption')].map(e => {
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const light = c => { const [r, g, b] = c.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05; };
  let under = e; while (under && numbers(getComputedStyle(under).backgroundColor)[3] === 0) under = under.parentElement;
  const [a, b] = [getComputedStyle(e).color, getComputedStyle(under || document.body).backgroundColor].map(c => light(numbers(c).slice(0, 3)));
  return [Math.max(a, b) / Math.min(a, b), e.outerHTML.slice(0, 80)];
}).sort((a, b) => a[0] - b[0])[0]"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(browser, path, scheme):
    browser.open(path, scheme=scheme)
    assert (browser.run("matchMedia('(prefers-color-scheme: dark)').matches")) == (scheme == "dark")
    least, where = browser.run(CONTRASTS)
    assert least >= 4.5, where
    corner = np.array(Image.open(io.BytesIO(browser.picture())).convert("RGB"))[5, 5]
    assert corner.mean() > 240 if scheme == "light" else corner.mean() < 40


@pytest.mark.parametrize("width", [360, 800])
def test_fits_narrow_screens(browser, path, width):
    browser.open(path, width=width, height=700, mobile=True)
    assert browser.run("document.documentElement.scrollWidth") <= width
    browser.mouse("mouseMoved", *look_at(browser, 3))
    assert browser.run("chosen") == 3


def test_findings_of_a_folder(tmp_path, browser):
    "From files to the page: rows agree with the fit, what could not be read is named."
    for i, image in enumerate(np.rint(load_digits().images[:60] * 255 / 16).astype(np.uint8)):
        Image.fromarray(image).save(tmp_path / f"{i:02}.png")
    (tmp_path / "10.png").rename(tmp_path / "<b>10.png")
    (tmp_path / "torn.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="could not be read"):
        est = MiCE(3, image_size=8, epochs=2, random_state=0, verbose=False).fit(tmp_path)
    found = findings_of(est, tmp_path)
    assert (found.clusters == est.labels_).all() and np.allclose(found.confidence, est.probabilities_)
    assert found.files == est.files_ and found.skipped == [("torn.png", found.skipped[0][1])]
    assert (found.runner_up != found.clusters).all() and (found.confidence >= 1 / 3).all()
    assert np.allclose(found.embeddings, est.transform(est.files_), atol=1e-5)
    write_report(tmp_path / "out" / "report.html", found)
    browser.open(tmp_path / "out" / "report.html")
    assert sorted(browser.run("data.names")) == sorted(name.removeprefix(f"{tmp_path}/") for name in est.files_)
    text = browser.run("document.body.textContent")
    assert all(words in text for words in ("torn.png", "2 epochs", "seed 0", "could not be read"))
    assert browser.complaints() == [] and str(tmp_path) not in text


def test_near_duplicates_of_changed_copies():
    "Recompressed, brighter and resampled copies are found among unrelated pictures, and nothing else is."
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (300, 6, 6, 3), np.uint8)
    images = np.stack([np.asarray(Image.fromarray(x).resize((32, 32), Image.Resampling.BICUBIC)) for x in small])
    jpeg = io.BytesIO()
    Image.fromarray(images[10]).save(jpeg, "jpeg", quality=70)
    copies = [np.asarray(Image.open(jpeg)), (images[20] * 0.9 + 10).astype(np.uint8), np.asarray(Image.fromarray(images[30]).resize((24, 24)).resize((32, 32))), images[40]]
    images = np.concatenate([images, copies])
    flat = images.reshape(len(images), -1).astype(np.float32)
    found = near_duplicates(Findings(images, None, None, None, [], flat - flat.mean(1, keepdims=True)))
    assert {(i, j) for i, j, _ in found} == {(10, 300), (20, 301), (30, 302), (40, 303)}
    assert found[0][:2] == (40, 303) and found[0][2] == 1


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_handful_of_images(n, tmp_path, browser):
    few = painted(60)
    few = Findings(*(getattr(few, name)[:n] for name in Findings._fields[:6]))
    write_report(tmp_path / "few.html", few._replace(files=[]))
    browser.open(tmp_path / "few.html").run("chart.focus()")
    browser.key("ArrowRight")
    assert browser.run("data.names[chosen]").startswith("image ") and browser.complaints() == []


@pytest.mark.long
def test_fifty_thousand_images(tmp_path, browser, record):
    "Noise, which no codec makes small, under long names: the file stays below 20 MB, and a hand does not wait."
    rng = np.random.default_rng(0)
    M, smooth = 50_000, rng.integers(0, 256, (5000, 8, 8, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    images = np.concatenate([smooth + rng.integers(0, 30, smooth.shape, np.uint8) for _ in range(10)])
    clusters = rng.integers(0, 10, M)
    embeddings = (np.eye(10, 64)[clusters] + rng.normal(0, 0.3, (M, 64))).astype(np.float32)
    files = [f"/photos/{i % 7}/{rng.bytes(16).hex()}.jpg" for i in range(M)]
    path, started, cpu = tmp_path / "large.html", time.perf_counter(), time.process_time()
    write_report(path, Findings(images, clusters, rng.uniform(0.1, 1, M), (clusters + 1) % 10, files, embeddings))
    seconds, cpu, size = time.perf_counter() - started, time.process_time() - cpu, path.stat().st_size
    started = time.perf_counter()
    opened = (browser.open(path), browser.frame(), time.perf_counter() - started)[-1]
    search = browser.run("(() => { const t = performance.now(); for (let i = 0; i < 50; i++) nearest(i, i, 1e9, (a, b) => a * a + b * b); return (performance.now() - t) / 50; })()")
    assert browser.complaints() == []
    timed = "(() => { const t = performance.now(); for (let i = 0; i < 10; i++) { %s; draw(); pen.getImageData(0, 0, 1, 1); } return (performance.now() - t) / 10; })()"
    drawn, marked = browser.run(timed % "redraw()"), browser.run(timed % "choose(i, false)")
    said = f"{size / 1e6:.1f} MB, made in {seconds:.0f} s ({cpu:.0f} s of CPU), opened in {opened:.1f} s, a dot found in {search:.2f} ms and marked in {marked:.1f} ms, the map drawn in {drawn:.0f} ms"
    print(said)
    record("a report of 50,000 images has at most 20 MB, takes at most 2 minutes of one core, and answers at once", said, int(size <= 20e6 and cpu < 120 and search < 5 and marked < 50 and drawn < 1000), 1)
