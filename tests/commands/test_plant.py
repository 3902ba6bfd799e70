from __future__ import annotations

import json
from xml.etree import ElementTree as ET

import pytest

from predictors.architecture import catalogue
from throttle.cli import main
from throttle.simulation.operators import IterationWork
from throttle.simulation.parameters import gpu_names, plant_names
from throttle.simulation.plant import Plant

H200 = ("plant", "--gpu", "h200-sxm", "--model", "qwen3-30b-a3b")
FIGURES = {
    "latency_seconds",
    "power_watts",
    "energy_joules",
    "effective_clock_mhz",
    "active_experts",
    "shares",
}


def printed(capsys, *arguments):
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def printed_json(capsys, *arguments):
    return json.loads(printed(capsys, *arguments, "--json"))


def refusal(capsys, *arguments):
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def test_json_holds_the_plants_own_figures(capsys):
    report = printed_json(
        capsys, *H200, "--decode-requests", "32", "--context", "700", "--clock", "1200"
    )
    assert report.keys() >= FIGURES
    assert report["simulated"] is True
    plant = Plant.load("h200-qwen3-30b-a3b")
    cost = plant.iteration(IterationWork((), 32, 32 * 700), 1200)
    assert report["latency_seconds"] == cost.latency_seconds
    assert report["energy_joules"] == cost.latency_seconds * cost.power_watts
    assert report["effective_clock_mhz"] == report["clock_mhz"] == 1200
    assert report["shares"].keys() == {"compute", "memory", "fixed", "communication"}
    assert sum(report["shares"].values()) == pytest.approx(1.0)


def test_energy_is_power_times_latency(capsys):
    report = printed_json(capsys, *H200, "--prefill-tokens", "2048")
    assert report["energy_joules"] == pytest.approx(
        report["power_watts"] * report["latency_seconds"]
    )


def test_a_prompt_alone_has_no_requests_that_generate(capsys):
    report = printed_json(capsys, *H200, "--prefill-tokens", "500")
    assert (report["decode_requests_count"], report["prefill_tokens"]) == (0, 500)
    assert printed_json(capsys, *H200)["decode_requests_count"] == 16


def test_a_sweep_holds_every_clock_once(capsys):
    report = printed_json(capsys, *H200, "--sweep")
    clocks = [row["clock_mhz"] for row in report["clocks"]]
    assert clocks == list(Plant.load("h200-qwen3-30b-a3b").clocks_mhz)
    latencies = [row["latency_seconds"] for row in report["clocks"]]
    assert latencies == sorted(latencies, reverse=True)
    assert all(row.keys() >= FIGURES for row in report["clocks"])


def test_a_clock_between_two_supported_ones_is_taken_down(capsys):
    assert printed_json(capsys, *H200, "--clock", "1207")["clock_mhz"] == 1200


def test_the_power_limit_shows_in_the_effective_clock(capsys):
    report = printed_json(
        capsys, "plant", "--gpu", "h100-sxm", "--model", "llama-3.1-8b", "--prefill-tokens", "8192"
    )
    assert report["effective_clock_mhz"] < report["clock_mhz"]
    assert report["power_watts"] <= 700
    text = printed(
        capsys, "plant", "--gpu", "h100-sxm", "--model", "llama-3.1-8b", "--prefill-tokens", "8192"
    )
    assert "capped from 1980" in text


def test_more_tokens_than_an_engine_takes_at_once_are_computed_all_the_same(capsys):
    small = printed_json(capsys, *H200, "--prefill-tokens", "8192")
    large = printed_json(capsys, *H200, "--prefill-tokens", "12000")
    assert large["latency_seconds"] > 1.3 * small["latency_seconds"]


def test_the_table_can_be_read_and_says_simulated(capsys):
    text = printed(capsys, *H200)
    assert "simulated" in text.splitlines()[0]
    for word in ("latency", "power", "energy", "active experts", "share of memory"):
        assert word in text
    sweep = printed(capsys, *H200, "--sweep")
    assert sum("least energy" in line for line in sweep.splitlines()) == 1


@pytest.mark.parametrize("gpu", gpu_names())
def test_every_gpu_runs_a_dense_model(capsys, gpu):
    report = printed_json(capsys, "plant", "--gpu", gpu, "--model", "llama-3.1-8b")
    assert report["gpu"] == gpu
    assert report["latency_seconds"] > 0


@pytest.mark.parametrize("model", catalogue())
def test_every_model_of_the_catalogue_runs_on_h200(capsys, model):
    report = printed_json(
        capsys, "plant", "--gpu", "h200-sxm", "--model", model, "--tp", "8", "--ep", "1"
    )
    assert report["model"] == model
    assert report["gpus_count"] == 8


@pytest.mark.parametrize("name", plant_names())
def test_every_shipped_plant_runs(capsys, name):
    report = printed_json(capsys, "plant", "--plant", name, "--decode-requests", "8")
    assert report["plant"] == name
    assert report["weights_fit"] is True


def test_number_formats_and_parallelism_are_taken(capsys):
    arguments = ("plant", "--gpu", "h200-sxm", "--model", "qwen3-235b-a22b", "--tp", "8")
    report = printed_json(
        capsys, *arguments, "--ep", "8", "--weight-dtype", "fp8_block", "--kv-dtype", "fp8"
    )
    assert (report["weight_dtype"], report["kv_dtype"]) == ("fp8_block", "fp8")
    assert (report["tensor_parallel_count"], report["expert_parallel_count"]) == (8, 8)


def test_weights_that_do_not_fit_are_said_so(capsys):
    arguments = ("plant", "--gpu", "h200-sxm", "--model", "qwen3-235b-a22b")
    assert printed_json(capsys, *arguments)["weights_fit"] is False
    assert "do not fit" in printed(capsys, *arguments)


def test_a_parameter_can_be_set(capsys):
    plain = printed_json(capsys, *H200)
    slow = printed_json(capsys, *H200, "--set", "gpu.memory.bandwidth_bytes_per_second=2.4e12")
    assert slow["latency_seconds"] > 1.2 * plain["latency_seconds"]


def test_an_engine_option_that_the_file_leaves_out_can_be_set(capsys):
    printed(capsys, *H200, "--set", "engine.role=decode", "--set", "engine.draft_tokens_count=3")


def test_a_draw_depends_on_its_seed_alone(capsys):
    first, again, other = (printed_json(capsys, *H200, "--draw", seed) for seed in ("1", "1", "2"))
    assert first == again
    assert first["latency_seconds"] != other["latency_seconds"]


def test_a_plot_is_an_svg_or_a_png_by_suffix(capsys, tmp_path):
    svg, png = tmp_path / "clocks.svg", tmp_path / "clocks.png"
    printed(capsys, *H200, "--plot", str(svg))
    printed(capsys, *H200, "--plot", str(png), "--sweep", "--json")
    text = svg.read_text()
    assert ET.fromstring(text).tag.endswith("svg")
    for word in ("simulated", "latency (ms)", "SM clock asked for (MHz)", "least at"):
        assert word in text
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("plant",), ("--gpu", "a100-sxm", "l40s")),
        (("plant", "--gpu", "h200-sxm"), ("--model", "olmoe-1b-7b")),
        (("plant", "--gpu", "h300", "--model", "qwen3-30b-a3b"), ("h300", "h200-sxm")),
        (("plant", "--gpu", "h200-sxm", "--model", "gpt-5"), ("gpt-5", "gpt-oss-120b")),
        ((*H200, "--weight-dtype", "fp7"), ("weight_dtype", "fp7", "fp8")),
        ((*H200, "--tp", "3"), ("tensor_parallel_count", "3", "32 attention heads")),
        ((*H200, "--tp", "0"), ("--tp", "0", "1 or more")),
        ((*H200, "--ep", "-2"), ("--ep", "-2", "1 or more")),
        ((*H200, "--ep", "5"), ("expert_parallel_count", "5", "128 experts")),
        ((*H200, "--clock", "5000"), ("--clock", "5000", "345 to 1980 MHz")),
        ((*H200, "--decode-requests", "-1"), ("--decode-requests", "-1", "0 or above")),
        ((*H200, "--context", "-5"), ("--context", "-5")),
        ((*H200, "--decode-requests", "0"), ("--decode-requests", "--prefill-tokens")),
        ((*H200, "--set", "nonsense"), ("--set", "nonsense", "KEY=VALUE")),
        ((*H200, "--set", "gpu.nonsense=1"), ("gpu.nonsense", "1", "name")),
        ((*H200, "--plot", "chart.pdf"), ("--plot", "chart.pdf", ".svg or .png")),
        (("plant", "--plant", "none"), ("none", "h200-qwen3-30b-a3b")),
        (("plant", "--plant", "h200-qwen3-30b-a3b", "--tp", "2"), ("--tp", "2", "--set")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_refusal_is_one_line_that_names_thing_value_and_what_is_allowed(capsys, arguments, named):
    line = refusal(capsys, *arguments)
    for word in named:
        assert word in line


def test_calibration_is_a_command_of_its_own_below(capsys):
    with pytest.raises(SystemExit) as ended:
        main(("plant", "calibrate", "--help"))
    assert ended.value.code == 0
    assert "--measured" in capsys.readouterr().out
