"""The status page of a real daemon, in a real browser."""

from __future__ import annotations

import json
import re
import signal
import urllib.error
import urllib.request

import pytest

from tests.integration.engines import DEADLINE_SECONDS, park, registration, state

SCRIPT = "<img src=x onerror=\"document.title='owned'\">"


@pytest.fixture
def served(start_daemon, unused_port):
    return start_daemon("--metrics-address", f"127.0.0.1:{unused_port}"), (
        f"http://127.0.0.1:{unused_port}"
    )


def get(url):
    with urllib.request.urlopen(url, timeout=DEADLINE_SECONDS) as answer:
        return answer.read().decode()


def test_the_data_says_what_engines_and_gpus_do_and_why(served):
    daemon, url = served
    stream = daemon.stream(registration())
    stream.accepted()
    park(stream)
    document = json.loads(get(f"{url}/status.json"))
    gpu = next(gpu for gpu in document["gpus"] if gpu["uuid"] == "GPU-a")
    assert (gpu["state"], gpu["target_mhz"], gpu["engine"]) == ("throttled", 345, "engine")
    assert gpu["clock_state"] in {"requested", "converged"}
    (engine,) = document["engines"]
    assert (engine["id"], engine["mode"], engine["reason"]) == ("engine", "act", "parked")
    assert document["changes"][0]["to_mhz"] == 345
    assert document["changes"][0]["reason"] == "parked"
    assert document["simulated"] is True
    stream.close()
    document = json.loads(get(f"{url}/status.json"))
    assert document["engines"] == []
    assert document["changes"][0]["reason"] == "given_back"


def test_slack_and_predicted_saving_are_told(served):
    daemon, url = served
    stream = daemon.stream(registration())
    stream.accepted()
    for number in range(1, 700):
        decision = stream.decide(state(number))
    (engine,) = json.loads(get(f"{url}/status.json"))["engines"]
    assert engine["slack_seconds"] == pytest.approx(decision.binding_limit.slack_seconds)
    assert engine["slo"] in {"ttft", "tbt", "tpot", "e2e"}
    assert 0 < decision.long_run_power_watts < decision.default_long_run_power_watts
    saving = 1 - decision.long_run_power_watts / decision.default_long_run_power_watts
    assert engine["predicted_saving_ratio"] == pytest.approx(saving)
    metrics = get(f"{url}/metrics")
    assert 'throttle_slo_slack_seconds{engine="engine",slo=' in metrics
    assert 'throttle_gpu_state{gpu="GPU-a",state="left_throttled"} 0.0' in metrics
    stream.close()


def test_ready_ends_before_the_daemon_does(served):
    daemon, url = served
    assert get(f"{url}/livez") == "ok\n"
    assert get(f"{url}/readyz") == "serving\n"
    stream = daemon.stream(registration())
    stream.accepted()
    daemon.process.send_signal(signal.SIGTERM)
    answers = set()
    while daemon.process.poll() is None:
        try:
            get(f"{url}/readyz")
        except urllib.error.HTTPError as error:
            answers.add(error.code)
        except OSError:
            break
    assert daemon.process.wait(DEADLINE_SECONDS) == 0
    assert answers <= {503}


def test_the_page_shows_it_live_and_asks_nobody_else(served, chromium, tmp_path):
    daemon, url = served
    stream = daemon.stream(registration("vllm-0"))
    stream.accepted()
    park(stream)
    log = tmp_path / "net.json"
    page = chromium(f"--log-net-log={log}", "--dump-dom", f"{url}/")
    assert '<span id="live" role="status" class="ok">live</span>' in page
    text = re.sub(r"<[^>]+>", " ", page)
    for shown in ("vllm-0", "GPU-a", "parked", "345 MHz", "simulated GPUs", "throttled"):
        assert shown in text
    assert page.count("<polyline") == 6
    asked = set(re.findall(r'"url":"(https?://[^"/]+)[^"]*"', log.read_text()))
    of_page = {each for each in asked if each.startswith("http://127.0.0.1")}
    assert of_page == {url}
    sources = "".join(get(f"{url}/{name}") for name in ("", "status.css", "status.js", "icon.svg"))
    elsewhere = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", sources)) - {"http://www.w3.org"}
    assert not elsewhere


def test_an_engines_id_is_text_and_never_runs(served, chromium):
    daemon, url = served
    stream = daemon.stream(registration(SCRIPT))
    stream.accepted()
    page = chromium("--dump-dom", f"{url}/")
    assert "<title>throttle</title>" in page
    assert "&lt;img src=x" in page
    assert "<img" not in page
