from __future__ import annotations

import json
import threading
import time

import pytest

from throttle.actuation import journal
from throttle.actuation.journal import GpuRecord, left_slow_uuids
from throttle.errors import ConflictError, ThrottleError


def test_a_new_record_leaves_nothing_to_undo(tmp_path):
    record = GpuRecord(tmp_path / "state", "GPU-a", "test")
    assert not record.left_slow
    assert list(left_slow_uuids(tmp_path / "state")) == []


@pytest.mark.parametrize("step", ["intend", "mark"])
def test_an_intent_or_a_mark_is_found_by_whoever_comes_next(tmp_path, step):
    record = GpuRecord(tmp_path, "GPU-a/b", "test")
    getattr(record, step)(900)
    record.close()
    assert list(left_slow_uuids(tmp_path)) == ["GPU-a/b"]
    again = GpuRecord(tmp_path, "GPU-a/b", "test")
    assert again.left_slow
    again.clear()
    again.close()
    assert list(left_slow_uuids(tmp_path)) == []


def test_a_record_of_before_the_last_boot_is_dropped(tmp_path, monkeypatch):
    record = GpuRecord(tmp_path, "GPU-a", "test")
    record.intend(900)
    record.close()
    monkeypatch.setattr(journal, "boot_id", lambda: "another boot")
    assert list(left_slow_uuids(tmp_path)) == []


@pytest.mark.parametrize(
    "content", [b"{", b"\xff\xfe", b"[]", b"null", b'{"state": 3}', b"x" * 900]
)
def test_a_record_that_cannot_be_read_counts_as_an_intent(tmp_path, content):
    (tmp_path / "gpu-GPU-a").write_bytes(content)
    assert list(left_slow_uuids(tmp_path)) == ["GPU-a"]
    assert GpuRecord(tmp_path, "GPU-a", "test").left_slow


def test_a_held_gpu_is_refused_with_its_holders_name_and_free_once_it_is_let_go(tmp_path):
    first = GpuRecord(tmp_path, "GPU-a", "the first")
    with pytest.raises(ConflictError, match="GPU GPU-a is held by the first; stop it, or name"):
        GpuRecord(tmp_path, "GPU-a", "the second")
    first.close()
    second = GpuRecord(tmp_path, "GPU-a", "the second")
    written = json.loads((tmp_path / "gpu-GPU-a").read_text())
    assert written["holder"] == "the second"
    second.close()


def test_a_holder_that_is_about_to_end_is_waited_for(tmp_path):
    first = GpuRecord(tmp_path, "GPU-a", "the first")
    timer = threading.Timer(0.05, first.close)
    timer.start()
    started = time.monotonic()
    GpuRecord(tmp_path, "GPU-a", "the second", patience_seconds=30.0).close()
    assert time.monotonic() - started < 30.0
    timer.join()


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ThrottleError, match="--actuation-state-directory"):
        GpuRecord(tmp_path / "file" / "state", "GPU-a", "test")
