#!/usr/bin/env python3
"""Record short profiles of many simulated models and GPUs: what the generic bundle learns from.

    scripts/record_generic.py --out out/generic [--minutes 3]
    throttle-predictors train --generic --data out/generic --out models

Every combination is a folder of its own; those that are there already are not recorded again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from throttle.actuation.simulated import SimulatedGpuFile
from throttle.commands.playing import gpu_entries
from throttle.commands.profile import Profiling
from throttle.daemon.logs import configure_logs
from throttle.simulation.drawing import draw_parameters
from throttle.simulation.plant import Plant, plant_for

#: Model, GPU, weight format (empty: as published), tensor parallel, expert parallel.
COMBINATIONS: tuple[tuple[str, str, str, int, int], ...] = (
    ("deepseek-v2-lite", "h100-sxm", "", 1, 1),
    ("deepseek-v2-lite", "h200-sxm", "", 1, 1),
    ("deepseek-v2-lite", "b200", "", 1, 1),
    ("deepseek-v2-lite", "h200-sxm", "fp8_block", 1, 1),
    ("deepseek-v2-lite", "b200", "fp8_block", 1, 1),
    ("deepseek-v3", "h200-sxm", "", 8, 8),
    ("deepseek-v3", "b200", "", 8, 8),
    ("glm-4.5-air", "a100-sxm", "", 4, 4),
    ("glm-4.5-air", "h100-sxm", "", 4, 4),
    ("glm-4.5-air", "h200-sxm", "fp8", 1, 1),
    ("glm-4.5-air", "b200", "", 2, 1),
    ("gpt-oss-20b", "h100-sxm", "", 1, 1),
    ("gpt-oss-20b", "h200-sxm", "", 1, 1),
    ("gpt-oss-20b", "b200", "", 1, 1),
    ("gpt-oss-20b", "l40s", "", 1, 1),
    ("gpt-oss-120b", "h100-sxm", "", 1, 1),
    ("gpt-oss-120b", "h200-sxm", "", 1, 1),
    ("gpt-oss-120b", "b200", "", 1, 1),
    ("llama-3.1-8b", "a100-sxm", "", 1, 1),
    ("llama-3.1-8b", "h100-sxm", "", 1, 1),
    ("llama-3.1-8b", "b200", "", 1, 1),
    ("llama-4-scout", "h100-sxm", "", 4, 4),
    ("llama-4-scout", "h200-sxm", "", 2, 1),
    ("llama-4-scout", "b200", "fp8", 1, 1),
    ("mixtral-8x7b", "a100-sxm", "", 2, 1),
    ("mixtral-8x7b", "h100-sxm", "", 2, 1),
    ("mixtral-8x7b", "h200-sxm", "fp8", 1, 1),
    ("mixtral-8x7b", "b200", "", 1, 1),
    ("olmoe-1b-7b", "a100-sxm", "", 1, 1),
    ("olmoe-1b-7b", "h100-sxm", "", 1, 1),
    ("olmoe-1b-7b", "l40s", "", 1, 1),
    ("qwen3-235b-a22b", "h100-sxm", "", 8, 8),
    ("qwen3-235b-a22b", "h200-sxm", "", 4, 4),
    ("qwen3-235b-a22b", "b200", "", 4, 4),
    ("qwen3-235b-a22b", "h100-sxm", "fp8_block", 4, 4),
    ("qwen3-235b-a22b", "h200-sxm", "fp8_block", 4, 4),
    ("qwen3-235b-a22b", "b200", "fp8_block", 4, 4),
    ("qwen3-30b-a3b", "a100-sxm", "", 1, 1),
    ("qwen3-30b-a3b", "h100-sxm", "", 1, 1),
    ("qwen3-30b-a3b", "h200-sxm", "", 1, 1),
    ("qwen3-30b-a3b", "b200", "", 1, 1),
    ("qwen3-30b-a3b", "h200-sxm", "fp8", 1, 1),
    # dense models, so that one is known when another is not
    ("qwen3-8b", "a100-sxm", "", 1, 1),
    ("qwen3-8b", "h100-sxm", "", 1, 1),
    ("qwen3-8b", "h200-sxm", "", 1, 1),
    ("qwen3-8b", "b200", "", 1, 1),
    ("qwen3-32b", "h100-sxm", "", 2, 1),
    ("qwen3-32b", "h200-sxm", "fp8", 1, 1),
    ("llama-3.1-70b", "a100-sxm", "", 4, 1),
    ("llama-3.1-70b", "h100-sxm", "", 4, 1),
    ("llama-3.1-70b", "b200", "", 1, 1),
    # few wide experts, split by tensor
    ("mixtral-8x22b", "a100-sxm", "", 8, 1),
    ("mixtral-8x22b", "h100-sxm", "", 8, 1),
    ("mixtral-8x22b", "b200", "", 2, 1),
    ("phi-3.5-moe", "a100-sxm", "", 2, 1),
    ("phi-3.5-moe", "h100-sxm", "", 2, 1),
    ("phi-3.5-moe", "h200-sxm", "", 1, 1),
    ("llama-4-scout", "a100-sxm", "", 4, 1),
    # experts spread over B200, and eight-bit blocks
    ("glm-4.5-air", "b200", "fp8_block", 4, 4),
    ("llama-4-scout", "b200", "fp8", 4, 4),
    ("gpt-oss-120b", "b200", "", 4, 4),
    ("qwen3-30b-a3b", "b200", "fp8_block", 1, 1),
    ("qwen3-30b-a3b", "b200", "fp8_block", 4, 4),
    # many small experts on H200
    ("glm-4.5-air", "h200-sxm", "", 2, 1),
    ("olmoe-1b-7b", "h200-sxm", "", 1, 1),
    ("qwen3-30b-a3b", "h200-sxm", "fp8_block", 1, 1),
)
_UUID = "GPU-simulated-0"


def record(plant: Plant, out: Path, seed: int, minutes: float, *, one_chip: bool = False) -> None:
    """Profile one plant into a folder; goes on where it was interrupted."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="throttle-profile-") as folder:
        path = Path(folder) / "gpus"
        with SimulatedGpuFile.create(path, gpu_entries(plant, [_UUID])) as file:
            Profiling(plant, file, path, out, seed, 60.0 * minutes, one_chip=one_chip).run()


def main() -> int:
    """Record what is missing; 0 when all is there."""
    parser = argparse.ArgumentParser(description="Record profiles for the generic bundle.")
    parser.add_argument("--out", type=Path, required=True, help="folder of folders")
    parser.add_argument("--minutes", type=float, default=3.0, help="engine time of each")
    parser.add_argument("--draws", type=int, default=1, help="randomized plants of each, beside it")
    arguments = parser.parse_args()
    configure_logs("error", "auto")
    for index, (model, gpu, weights, tensor, expert) in enumerate(COMBINATIONS):
        plant = plant_for(gpu, model, weights, "", tensor, expert)
        for draw in range(arguments.draws + 1):
            name = f"{gpu}__{model}{weights and '-' + weights}__tp{tensor}ep{expert}__{draw}"
            if list((arguments.out / name).glob("*.parquet")):
                continue
            print(name, file=sys.stderr, flush=True)
            # randomized plants of seeds that judging does not draw
            drawn = Plant(draw_parameters(plant.parameters, 9000 + index)) if draw else plant
            record(drawn, arguments.out / name, 100 + draw, arguments.minutes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
