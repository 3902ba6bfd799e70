from __future__ import annotations

import itertools

import pytest
import structlog

from throttle.daemon.sessions import RecordingPlan, SessionLimits, Sessions, StoppingError
from throttle.errors import ConflictError, NotFoundError, ThrottleError
from throttle.v1 import engine_pb2


@pytest.fixture
def make_sessions(actuator, telemetry, factory, metrics, clock):
    numbers = itertools.count(1)

    def make(recordings=None, engines_count=3):
        return Sessions(
            actuator=actuator,
            telemetry=telemetry,
            brain_factory=factory,
            recording=RecordingPlan(recordings, simulated=True),
            limits=SessionLimits(engines_count, 1.0, 10.0),
            metrics=metrics,
            clock=clock,
            new_registration_id=lambda: f"registration-{next(numbers)}",
            log=structlog.get_logger(),
        )

    return make


@pytest.fixture
def sessions(make_sessions):
    return make_sessions()


@pytest.mark.parametrize(("asked", "granted"), [(0.5, 1.0), (2.0, 2.0), (60.0, 10.0)])
def test_a_lease_is_brought_within_the_configured_limits(sessions, registered, asked, granted):
    opened = sessions.open(registered(lease_timeout_seconds=asked))
    assert opened.session.profile.lease_seconds == granted


def test_the_brain_is_made_for_the_engines_own_gpus(sessions, registered, factory):
    sessions.open(registered(gpu_uuids=["GPU-b", "GPU-c"]))
    ((profile, gpu),) = factory.asked
    assert profile.gpu_uuids == ("GPU-b", "GPU-c")
    assert (gpu.name, gpu.clocks_mhz) == ("h200-sxm", (600, 900, 1200, 1500))


def test_a_refused_engine_leaves_nothing_behind(sessions, registered, factory, actuator):
    with pytest.raises(NotFoundError):
        sessions.open(registered(gpu_uuids=["GPU-a", "GPU-x"]))
    factory.build = lambda profile, gpu: (_ for _ in ()).throw(ThrottleError("no bundle"))
    with pytest.raises(ThrottleError, match="no bundle"):
        sessions.open(registered())
    assert sessions.statuses() == []
    assert actuator.owner("GPU-a") == ""
    del factory.build
    assert sessions.open(registered())


def test_there_is_a_limit_to_engines(make_sessions, registered):
    sessions = make_sessions(engines_count=1)
    first = sessions.open(registered())
    with pytest.raises(ConflictError, match="allowed: engines_limit, 1"):
        sessions.open(registered(engine_id="second", gpu_uuids=["GPU-b"]))
    sessions.close(first)
    assert sessions.open(registered(engine_id="second", gpu_uuids=["GPU-b"]))


def test_closing_twice_does_not_end_a_later_session_of_the_same_engine(sessions, registered):
    first = sessions.open(registered())
    sessions.close(first)
    second = sessions.open(registered())
    sessions.close(first)
    assert [status.engine_id for status in sessions.statuses()] == ["engine"]
    assert second.mailbox.take(0.0) == []


def test_releasing_without_a_name_releases_every_engine(sessions, registered, gpus, arrival):
    for name in "ab":
        opened = sessions.open(registered(engine_id=name, gpu_uuids=[f"GPU-{name}"]))
        opened.session.handle([arrival()])
    assert sorted(sessions.release("")) == ["GPU-a", "GPU-b"]
    assert {gpus.read_lock_mhz(uuid) for uuid in gpus.uuids()} == {0}
    with pytest.raises(NotFoundError, match="'c' is not connected; there: a, b"):
        sessions.release("c")


def test_draining_resets_every_gpu_ends_every_stream_and_refuses_new_ones(
    sessions, registered, gpus, arrival
):
    opened = sessions.open(registered())
    opened.session.handle([arrival()])
    assert gpus.read_lock_mhz("GPU-a") == 900
    sessions.drain()
    assert gpus.read_lock_mhz("GPU-a") == 0
    assert opened.mailbox.take(None) is None
    assert isinstance(opened.mailbox.error, StoppingError)
    with pytest.raises(StoppingError):
        sessions.open(registered(engine_id="late"))


def test_a_stuck_session_is_released_and_others_are_not(sessions, registered, gpus, arrival, clock):
    stuck = sessions.open(registered(engine_id="stuck", gpu_uuids=["GPU-a"]))
    quick = sessions.open(registered(engine_id="quick", gpu_uuids=["GPU-b"]))
    for opened in (stuck, quick):
        opened.session.handle([arrival()])
    stuck.mailbox.put(arrival())
    clock.seconds += 2.5
    sessions.release_stuck()
    assert gpus.read_lock_mhz("GPU-a") == 0
    assert gpus.read_lock_mhz("GPU-b") == 900


def test_every_engine_is_recorded_where_a_directory_is_given(
    make_sessions, registered, arrival, tmp_path, gpus
):
    sessions = make_sessions(tmp_path / "records")
    modes = {
        "a": engine_pb2.CONTROL_MODE_ACT,
        "b": engine_pb2.CONTROL_MODE_SHADOW,
        "c": engine_pb2.CONTROL_MODE_RECORD,
    }
    for name, mode in modes.items():
        opened = sessions.open(registered(mode, engine_id=name, gpu_uuids=[f"GPU-{name}"]))
        opened.session.handle([arrival()])
        sessions.close(opened)
    names = sorted(path.name for path in (tmp_path / "records").iterdir())
    assert names == [
        "registration-1-a.parquet", "registration-2-b.parquet", "registration-3-c.parquet",
    ]  # fmt: skip


def test_record_mode_without_a_directory_is_refused(sessions, registered):
    with pytest.raises(ThrottleError, match="--recordings DIRECTORY"):
        sessions.open(registered(engine_pb2.CONTROL_MODE_RECORD))
