from __future__ import annotations

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from throttle.daemon.config import DaemonConfig
from throttle.daemon.tracing import SpanTracer, TracingSettings, make_tracer
from throttle.v1 import decision_pb2


@pytest.fixture
def decision():
    return decision_pb2.Decision(
        sequence_number=7,
        target_clock_mhz=900,
        applied_clock_mhz=900,
        decision_duration_seconds=0.5,
        binding_limit=decision_pb2.BindingLimit(slack_seconds=0.25),
    )


def test_a_decision_becomes_a_span_with_its_times_and_units(decision, registered):
    exporter = InMemorySpanExporter()
    tracer = SpanTracer(exporter, 1.0, wall_clock=lambda: 1000.0)
    tracer(registered(), decision, "applied", "cruise")
    tracer._provider.force_flush()
    (span,) = exporter.get_finished_spans()
    tracer.close()
    assert (span.start_time, span.end_time) == (999_500_000_000, 1_000_000_000_000)
    attributes = dict(span.attributes)
    assert attributes["gen_ai.request.model"] == "qwen3-30b-a3b"
    assert attributes["throttle.target_clock_mhz"] == 900
    assert attributes["throttle.slack_seconds"] == 0.25
    assert attributes["throttle.reason"] == "cruise"


def test_only_a_sample_is_traced(decision, registered):
    exporter = InMemorySpanExporter()
    draws = iter([0.05, 0.2, 0.09, 0.1])
    tracer = SpanTracer(exporter, 0.1, draw=lambda: next(draws))
    for _ in range(4):
        tracer(registered(), decision, "applied", "cruise")
    tracer._provider.force_flush()
    assert len(exporter.get_finished_spans()) == 2
    tracer.close()


def test_nothing_is_traced_by_default():
    assert make_tracer(TracingSettings()) is None


@pytest.mark.parametrize(
    "settings", [TracingSettings(sample_ratio=1.5), TracingSettings(endpoint="collector:4317")]
)
def test_settings_out_of_range_are_named(settings):
    problems = DaemonConfig(simulated_gpus=".", tracing=settings).problems()
    assert len(problems) == 1
    assert problems[0].startswith("tracing.")
