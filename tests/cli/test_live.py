"""A run while it goes on: the page that is served, and the lines of `show --follow`."""

import threading
import urllib.error
import urllib.request

import pytest

from diag.cli.live import follow
from diag.errors import InvalidInput
from diag.reporting.serving import live_server
from diag.run.writer import RunWriter

LAYERS = {"layers": {"body.weight": 6, "head.weight": 4}}


@pytest.fixture
def served(make_run):
    folder = make_run("run", 1000.0)
    server = live_server(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def get(address, **options):
    with urllib.request.urlopen(urllib.request.Request(address, **options), timeout=20) as answer:
        return answer.status, answer.read().decode(), answer.headers


def test_the_page_is_served_and_grows_with_the_run(served):
    folder, address = served
    _, page, headers = get(f"{address}/")
    _, version, _ = get(f"{address}/version")
    assert "Softmax collapse" in page and version in page and headers["Cache-Control"] == "no-store"
    with RunWriter(folder, LAYERS, resume=True) as writer:
        writer.append_event(100, "note", "Something new.")
    assert get(f"{address}/version")[1] != version
    assert "Something new." in get(f"{address}/report.json")[1]


@pytest.mark.parametrize(
    ("path", "options", "status"),
    [
        ("/", {"headers": {"Host": "evil.example"}}, 403),
        ("/../run.json", {}, 404),
        ("/run.json", {}, 404),
        ("/", {"method": "POST", "data": b"x"}, 501),
        ("/", {"method": "DELETE"}, 501),
    ],
)
def test_nothing_else_is_answered(served, path, options, status):
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(served[1] + path, **options)
    assert caught.value.code == status


def test_other_interfaces_are_refused_without_a_flag(run_diag, make_run):
    folder = make_run("run", 1.0)
    with pytest.raises(InvalidInput, match=r"served to this machine only, unless you give --public"):
        live_server(folder, "0.0.0.0")
    assert run_diag("live", folder, "--host", "0.0.0.0").exit_code == 2
    assert run_diag("live", "nowhere").exit_code == 2


def test_a_port_that_is_taken_is_one_sentence(served, make_run):
    port = int(served[1].rpartition(":")[2])
    with pytest.raises(InvalidInput, match="give another --port"):
        live_server(make_run("other", 1.0), port=port)


def test_follow_tells_each_finding_once_and_ends_with_the_run(make_run):
    folder = make_run("run", 1000.0)
    writer = RunWriter(folder, LAYERS, resume=True)
    lines, waits = [], []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            writer.append_event(130, "note", "x")
        if len(waits) == 3:
            writer.close()

    follow(folder, lines.append, sleep=sleep)
    assert sum(line.startswith("alarm: Softmax collapse.") for line in lines) == 1
    assert lines[0].startswith("step 100 · loss") and lines[-1] == "The run has ended at step 130."
    assert len(waits) == 3 and len(lines) == 4


def test_show_follow_of_a_run_that_has_ended(run_diag, make_run):
    shown = run_diag("show", make_run("run", 1000.0), "--follow")
    assert shown.exit_code == 0 and "The run has ended at step 100." in shown.stdout
