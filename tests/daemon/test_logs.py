from __future__ import annotations

import io
import json

import pytest
import structlog

from throttle.daemon.logs import configure_logs


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def _restore():
    yield
    structlog.reset_defaults()


def test_a_file_gets_json_with_level_and_time():
    output = io.StringIO()
    configure_logs("info", "auto", output)
    structlog.get_logger().info("clock_changed", from_mhz=0, to_mhz=900)
    entry = json.loads(output.getvalue())
    assert (entry["event"], entry["level"], entry["to_mhz"]) == ("clock_changed", "info", 900)
    assert entry["timestamp"].endswith("Z")


def test_a_terminal_gets_text():
    output = Terminal()
    configure_logs("info", "auto", output)
    structlog.get_logger().info("clock_changed", to_mhz=900)
    assert "clock_changed" in output.getvalue()
    assert not output.getvalue().startswith("{")


def test_lines_below_the_level_are_left_out():
    output = io.StringIO()
    configure_logs("warning", "json", output)
    structlog.get_logger().info("decision")
    assert output.getvalue() == ""


def test_an_error_carries_its_traceback():
    output = io.StringIO()
    configure_logs("info", "json", output)
    structlog.get_logger().error("control_fault", exc_info=ValueError("why"))
    assert json.loads(output.getvalue())["exception"][0]["exc_value"] == "why"
