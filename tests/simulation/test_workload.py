from __future__ import annotations

import gzip
import random

import pytest

from throttle.errors import InvalidInputError, NotFoundError
from throttle.simulation.engine import Fidelity
from throttle.simulation.profiling import DeepFilling, SweepingLoad, profiling_points
from throttle.simulation.workload import Lengths, load_trace, poisson, trace_names

HEAD = "arrival_seconds,prompt_tokens,output_tokens\n"


def test_the_shipped_trace_holds_ten_real_minutes():
    trace = load_trace("azure2023_conv_10min")
    assert trace_names() == (
        "azure2023_conv_10min",
        "servegen_mlarge_10min",
        "servegen_r1_10min",
    )
    assert len(trace.requests) == 2867
    assert 599 < trace.duration_seconds < 600
    assert [item.request_number for item in trace.requests] == list(range(1, 2868))


def test_a_window_is_contiguous_and_counts_from_its_start():
    trace = load_trace("azure2023_conv_10min")
    window = trace.window(60.0, 120.0)
    inside = [item for item in trace.requests if 60 <= item.arrival_seconds < 120]
    assert [item.prompt_tokens for item in window.requests] == [i.prompt_tokens for i in inside]
    assert window.requests[0].arrival_seconds == inside[0].arrival_seconds - 60
    assert window.requests[0].request_number == 1


def test_compression_is_remembered():
    trace = load_trace("azure2023_conv_10min")
    faster = trace.compressed(2.0).compressed(1.5)
    assert faster.compression_ratio == 3.0
    assert faster.duration_seconds == pytest.approx(trace.duration_seconds / 3)
    assert len(faster.requests) == len(trace.requests)


def test_other_columns_and_their_order_do_not_matter(tmp_path):
    path = tmp_path / "t.csv.gz"
    with gzip.open(path, "wt") as file:
        file.write("client_id,output_tokens,extra,arrival_seconds,prompt_tokens\n7,3,x,0.5,20\n")
    (request,) = load_trace(str(path)).requests
    assert (request.prompt_tokens, request.output_tokens, request.length_class) == (20, 3, "7")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arrival_seconds,prompt_tokens\n0,1\n", "columns.*header with .*output_tokens"),
        ("", "columns"),
        (HEAD, "at least one request"),
        (HEAD + "0,5,5\nnan,5,5\n", "row 2: arrival_seconds is 'nan'; allowed: a finite"),
        (HEAD + "-1,5,5\n", "row 1: arrival_seconds is '-1'"),
        (HEAD + "inf,5,5\n", "row 1: arrival_seconds is 'inf'"),
        (HEAD + "soon,5,5\n", "row 1: arrival_seconds is 'soon'"),
        (HEAD + "0,0,5\n", "row 1: prompt_tokens is '0'; allowed: a whole number, 1 or above"),
        (HEAD + "0,5,-5\n", "row 1: output_tokens is '-5'"),
        (HEAD + "0,5,NaN\n", "row 1: output_tokens is 'NaN'"),
        (HEAD + "0,5.5,5\n", "row 1: prompt_tokens is '5.5'"),
        (HEAD + "0,5\n", "row 1: output_tokens is None"),
        (HEAD + "3,5,5\n2,5,5\n", "row 2: arrival_seconds is 2.0; allowed: 3 or later"),
    ],
)
def test_a_bad_trace_is_refused_in_one_line_that_names_column_row_and_value(
    tmp_path, text, message
):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(InvalidInputError, match=message) as caught:
        load_trace(str(path))
    assert "\n" not in str(caught.value)
    assert "bad.csv" in str(caught.value)


def test_an_unknown_trace_names_the_shipped_ones():
    with pytest.raises(NotFoundError, match="azure2023_conv_10min"):
        load_trace("azure2077")


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan")])
def test_a_wrong_compression_is_refused(ratio):
    with pytest.raises(InvalidInputError, match="compression_ratio"):
        load_trace("azure2023_conv_10min").compressed(ratio)


def test_an_empty_window_is_refused():
    with pytest.raises(InvalidInputError, match="window"):
        load_trace("azure2023_conv_10min").window(700.0, 800.0)


def test_poisson_arrivals_have_the_asked_rate_and_lengths():
    lengths = Lengths((10, 1000), (5, 5))
    drawn = list(poisson(20.0, 200.0, lengths, random.Random(4)))
    assert len(drawn) == pytest.approx(4000, rel=0.05)
    assert all(10 <= item.prompt_tokens <= 1000 and item.output_tokens == 5 for item in drawn)
    arrivals = [item.arrival_seconds for item in drawn]
    assert arrivals == sorted(arrivals)


def test_profiling_covers_batches_contexts_and_chunks(bench, plant):
    kv_tokens = plant.kv_blocks_count * 16
    filling = DeepFilling(kv_tokens, budget_seconds=1200.0, rounds_count=9, point_seconds=1.5)
    fillings = (filling.point(index, 40_000.0) for index in range(9))
    points = [
        *profiling_points(kv_tokens, 8192, seconds_per_point=1.5),
        *(point for point in fillings if point is not None),
    ]
    load = SweepingLoad(points, 0.3, random.Random(6))
    world = bench(plant, (), source=load, fidelity=Fidelity.AGGREGATE)
    batches, contexts, chunks, idle = set(), set(), set(), 0
    for state in world.engine.run():
        scheduled = state.scheduled
        if scheduled.num_decode_requests:
            batches.add(scheduled.num_decode_requests)
            contexts.add(scheduled.sum_decode_kv_tokens / scheduled.num_decode_requests)
        if scheduled.num_prefill_requests:
            chunks.add(scheduled.sum_prefill_tokens)
        idle += scheduled.empty
    assert load.progress_ratio == 1.0
    assert min(batches) == 1
    assert max(batches) == 384
    assert len(batches) > 150
    assert min(contexts) < 150
    assert max(contexts) > 20_000
    assert min(chunks) < 100
    assert max(chunks) > 8000
    assert idle > len(points) // 4  # a pause after each fourth point
    assert world.engine.arrived_count == len(world.engine.outcomes)
