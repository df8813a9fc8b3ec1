"""The picture of a history: what is in the page, and where."""

import re
from html.parser import HTMLParser

import pytest

from mcp_celery.history import History
from mcp_celery.store import SessionRecord
from mcp_celery.timeline import MIN_WIDTH, Scale, render

START = 1_760_000_000.0
RECORD = SessionRecord(
    key="a585ad46" + 24 * "0",
    server="browser",
    state="open",
    opened_at=START,
    opened_by={},
    holders={},
    used_at=START,
    deadline=None,
    ended_at=None,
)
VOID = {"meta"}


class Element:
    def __init__(self, tag, attributes, parent):
        self.tag, self.attributes, self.parent = tag, attributes, parent
        self.text = ""

    @property
    def kinds(self):
        return self.attributes.get("class", "").split()

    def style(self, name):
        """A number of the element's style, whatever its unit."""
        found = re.search(rf"(?:^|;){name}:(-?[\d.]+)", self.attributes.get("style", ""))
        return float(found[1])


class Page(HTMLParser):
    """A page taken apart; fails where elements are not closed in order."""

    def __init__(self, events, facts=()):
        super().__init__()
        self.source = render(RECORD, facts, events)
        self.elements, self.open = [], [None]
        self.feed(self.source)
        assert self.open == [None]

    def handle_starttag(self, tag, attrs):
        self.elements.append(Element(tag, dict(attrs), self.open[-1]))
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        if self.open[-1] is not None:
            self.open[-1].text += data

    def find(self, kind):
        """The elements of a class in the picture."""
        return [e for e in self.elements if kind in e.kinds and e.tag == "div"]

    def rows(self):
        """The table as texts."""
        cells = [(e.parent, e.text) for e in self.elements if e.tag == "td"]
        return [[text for row, text in cells if row is parent] for parent in dict.fromkeys(row for row, _ in cells)]


def step(task, at, until, worker="a@host", **more):
    times = {"at": START + at, "until": START + until}
    return {"what": "step", "task": task, "id": task, "worker": worker, "outcome": "done", **times, **more}


def call(tool, at, seconds, ok=True):
    return {"what": f"tool {tool!r}", "at": START + at, "seconds": seconds, "ok": ok}


def mark(what, at, **more):
    return {"what": what, "at": START + at, **more}


WORKFLOW = [
    mark("opened", 0.02, task="proj.load", id="proj.load", worker="a@host"),
    step("proj.load", 0, 1, to=["proj.report"], calls=[call("add", 0.1, 0.4), call("mul", 0.6, 0.2, ok=False)]),
    step("proj.report", 1.5, 2, "b@host", outcome="failed"),
    mark("closed", 2, by="b@host", why="done"),
]


def test_steps_are_bars_by_worker_with_their_calls_and_the_marks():
    page = Page(WORKFLOW, [("Server", "browser")])
    assert [e.text for e in page.find("worker")] == ["a@host", "b@host"]
    load, report = page.find("step")
    assert (load.style("left"), load.style("width")) == (0, 50)
    assert (report.style("left"), report.style("width")) == (75, 25)
    assert load.attributes["title"] == "+0s: proj.load: done, handed to proj.report, 1s"
    assert "failed" in report.kinds
    assert [e.text for e in page.find("label")] == ["load", "report · failed"]
    add, mul = page.find("call")
    assert (add.style("left"), add.style("width"), add.attributes["title"]) == (5, 20, "+100ms: tool 'add', 400ms")
    assert add.parent is load.parent
    assert "bad" in mul.kinds
    assert [e.style("left") for e in page.find("mark")] == [1, 100]
    assert [e.text for e in page.find("flag")] == ["opened by proj.load", "closed by b@host: done"]
    assert [e.text for e in page.find("tick")] == ["0s", "500ms", "1s", "1.5s", "2s"]
    assert "MCP session a585ad46" in page.source
    assert "<dt>Server</dt><dd>browser</dd>" in page.source


def test_the_table_says_the_same():
    assert Page(WORKFLOW).rows() == [
        ["+0s", "1s", "a@host", "proj.load: done, handed to proj.report"],
        ["+20ms", "", "", "opened"],
        ["+100ms", "400ms", "", "tool 'add'"],
        ["+600ms", "200ms", "", "tool 'mul': failed"],
        ["+1.5s", "500ms", "b@host", "proj.report: failed"],
        ["+2s", "", "", "closed by b@host: done"],
    ]


def test_steps_that_overlap_on_one_worker_are_on_lines_of_their_own():
    page = Page([step("a", 0, 2), step("b", 1, 3), step("c", 2, 4), step("d", 1.5, 1.6)])
    tops = {e.text: e.style("top") for e in page.find("label")}
    assert tops["a"] == tops["c"] < tops["b"] < tops["d"]
    assert len(page.find("worker")) == 1


def test_a_long_quiet_time_is_drawn_short_and_says_how_long_it_was():
    page = Page([*WORKFLOW[:3], mark("closed", 86_402, by="reaper", why="expired")])
    (gap,) = page.find("gap")
    assert gap.attributes["title"] == "1d 0h quiet"
    assert gap.style("width") < 10
    assert [e.text for e in page.find("quiet")] == ["1d 0h quiet"]
    load, report = page.find("step")
    assert load.style("width") == pytest.approx(2 * report.style("width"), abs=0.01)
    assert "1d 0h" in [e.text for e in page.find("tick")]


def test_many_quiet_times_leave_room_for_the_steps():
    scale = Scale([(at, at + 0.01) for at in range(200)])
    assert len(scale.gaps) == 199
    assert sum(gap.right - gap.left for gap in scale.gaps) < 0.4


@pytest.mark.parametrize(
    "events",
    [
        [mark("opened", 0)],
        [mark("opened", 0), mark("closed", 0)],
        [mark("opened", 0), mark("closed", 9)],
        [step("a", 0, 0)],
        [step("a", 0, 0.00001), step("b", 3600, 3600)],
        [step("a", 0, 5), {"what": "unheard-of"}, {}],
        [step(f"s{n}", n / 7, n / 7 + n % 3, f"w{n % 4}") for n in range(200)],
        [mark("pinged", n) for n in range(60)],
        [step("a", 0, 50_000), step("b", 60_000, 400_000)],
    ],
)
def test_everything_is_within_the_picture(events):
    page = Page(events)
    placed = [e for kind in ("step", "call", "mark", "tick", "gap", "label", "grid") for e in page.find(kind)]
    for element in placed:
        assert 0 <= element.style("left") <= 100
        if "width" in element.attributes["style"]:
            assert 0 <= element.style("left") + element.style("width") <= 100.01
    assert len(page.find("step")) == len(History.read(events).steps)
    assert 1 <= len(page.find("tick")) <= 11
    texts = [e.text for e in page.find("tick") if "quiet" not in e.kinds]
    assert len(texts) == len(set(texts))
    tops = [e.style("top") for e in page.find("flag")]
    assert len(set(tops)) <= 4


def test_a_history_of_which_nothing_is_kept_says_so():
    page = Page([])
    assert "Nothing is kept" in page.source
    assert not page.find("plot")


def test_a_long_history_gets_a_wider_picture_to_scroll():
    (short,) = Page(WORKFLOW).find("plot")
    (long,) = Page([step("s", n, n + 0.5) for n in range(200)]).find("plot")
    assert short.style("min-width") == MIN_WIDTH < long.style("min-width")


def test_whatever_a_task_is_called_stays_text():
    evil = "</style></title><script src='http://x'>alert(1)</script>\"&"
    step_of_it = step(evil, 0, 1, evil, outcome=evil, to=[evil], calls=[{"what": evil, "at": START, "seconds": 1}])
    page = Page([step_of_it, mark(evil, 1, by=evil, why=evil), mark("opened", 0, task=evil)], [(evil, evil)])
    assert "<script" not in page.source
    tags = {"html", "head", "meta", "title", "style", "body", "h1", "dl", "dt", "dd", "figure", "div", "ul", "li", "i"}
    assert {e.tag for e in page.elements} <= tags | {"table", "caption", "thead", "tbody", "tr", "th", "td"}
    assert {name for e in page.elements for name in e.attributes} <= {
        *("lang", "charset", "http-equiv", "content", "name", "class", "style", "title"),
        *("role", "aria-label", "aria-hidden"),
    }


def test_the_page_needs_nothing_else():
    source = Page(WORKFLOW).source
    assert not re.search(r"https?:|url\(|@import|<script|<link|<img", source)
    assert "default-src 'none'" in source
