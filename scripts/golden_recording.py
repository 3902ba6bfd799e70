"""Writes the golden recording and its decisions, which guard the policy against silent change.

    python scripts/golden_recording.py            the decisions, after a change that is meant
    python scripts/golden_recording.py --record   the recording too, after a change of the format

The recording is a simulated engine's stream; decisions come from the closed-form predictor of
`throttle.testing`, so that a retrained bundle changes nothing here.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

from throttle.commands.replay import read_metadata, recorded_profile, replay
from throttle.control.controller import Controller
from throttle.control.settings import ControlSettings
from throttle.control.state import IterationState, Slos
from throttle.daemon.recording import Recording, read_states, records_metadata
from throttle.daemon.telemetry import GpuWindow
from throttle.simulation.engine import SimulatedEngine
from throttle.simulation.experiment import play
from throttle.simulation.gpu import DiscardedTelemetry, InProcessLock, SimulatedGpu
from throttle.simulation.messages import state_message
from throttle.simulation.plant import Plant
from throttle.simulation.workload import OpenLoop, load_trace
from throttle.testing import FormulaPredictor

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "golden"
RECORDING = FOLDER / "azure_15s.parquet"
DECISIONS = FOLDER / "azure_15s.json"
_SECONDS = 15.0


def record() -> None:
    """Play a stretch of the Azure trace and record it as the daemon does."""
    plant = Plant.load("h200-qwen3-30b-a3b")
    lock = InProcessLock()
    gpu = SimulatedGpu(plant, lock, DiscardedTelemetry(), random.Random(7))  # noqa: S311
    # Compressed, so that limits bind now and then.
    trace = load_trace("azure2023_conv_10min").window(60.0, 60.0 + 2.0 * _SECONDS).compressed(1.2)
    engine = SimulatedEngine(gpu, OpenLoop(trace.requests))
    slos = Slos(ttft_seconds=1.0, tpot_seconds=0.024)
    profile = engine.profile("golden", ("GPU-simulated-0",), slos)
    controller = Controller(profile, FormulaPredictor(), ControlSettings())
    metadata = records_metadata(profile, "h200-sxm", plant.clocks_mhz, simulated=True)
    RECORDING.unlink(missing_ok=True)
    recording = Recording(RECORDING, replace(metadata, throttle_version="golden"), "golden")
    target = 0

    def decide(state: IterationState) -> None:
        nonlocal target
        window = GpuWindow(gpu.clock_mhz, gpu.clock_mhz)
        recording.append(state, state_message(state), window, target)
        controller.observe(state, gpu.clock_mhz)
        target = controller.decide(state).target_clock_mhz
        lock.set_mhz(target)

    play(engine, gpu, decide, rest_seconds=1.0)
    recording.close()
    print(f"{RECORDING.name}: {recording.rows_count} states")


def golden_decisions() -> list[list[object]]:
    """Sequence number, clock and reason of each decision over the golden recording."""
    profile = recorded_profile(read_metadata(RECORDING), RECORDING.name)
    controller = Controller(profile, FormulaPredictor(), ControlSettings())
    return [
        [number, decision.target_clock_mhz, decision.reason.name.lower()]
        for number, decision in replay(read_states(RECORDING), profile, controller)
    ]


def main() -> None:
    """Write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write the recording too")
    arguments = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if arguments.record:
        record()
    decisions = golden_decisions()
    lines = ",\n".join(json.dumps(each) for each in decisions)
    DECISIONS.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(f"{DECISIONS.name}: {len(decisions)} decisions")


if __name__ == "__main__":
    main()
