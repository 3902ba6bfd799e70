"""Write small dumps as SGLang's expert-distribution recorder lays them out; not recorded with it.

    .venv-vllm/bin/python tests/data/written/write_sglang_dumps.py

Keys, shapes and types are those of SGLang 0.5.23. Two ranks serve one model of four layers (the
first without a router), 16 experts, 18 slots (two experts twice), two experts per token, in ten
passes: a prefill of 13 tokens, then decodes. In `stat` and `per_token` both ranks see the same
tokens (tensor parallelism), in `per_pass` each has half of them (all-to-all). `per_token` keeps the
first five passes.
"""

from __future__ import annotations

from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "sglang_experts"
LAYERS, EXPERTS, SLOTS, PER_TOKEN = 4, 16, 18, 2
PASSES = [13, 1, 4, 4, 8, 16, 16, 16, 2, 5]
SLOT_EXPERTS = torch.arange(SLOTS).repeat(LAYERS, 1) % EXPERTS


def routed():
    """Each pass's slots, (layers, tokens, 8); -1 without a router and behind the second expert."""
    draw = torch.Generator().manual_seed(1)
    popularity = torch.arange(1, EXPERTS + 1) ** -0.8
    for tokens in PASSES:
        slots = torch.full((LAYERS, tokens, 8), -1, dtype=torch.int32)
        for layer in range(1, LAYERS):
            experts = torch.multinomial(popularity.expand(tokens, -1), PER_TOKEN, generator=draw)
            second = torch.rand(experts.shape, generator=draw) < 0.5
            copied = second & (experts + EXPERTS < SLOTS)
            slots[layer, :, :PER_TOKEN] = torch.where(copied, experts + EXPERTS, experts)
        yield slots


def counted(slots):
    """(layers, slots) tokens."""
    counts = torch.zeros((LAYERS, SLOTS), dtype=torch.int32)
    for layer in range(LAYERS):
        taken = slots[layer][slots[layer] >= 0].long()
        counts[layer] = torch.bincount(taken, minlength=SLOTS).int()
    return counts


def save(name, document):
    path = FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(document, path)


def main():
    passes = list(routed())
    buffer = torch.zeros((12, LAYERS, EXPERTS), dtype=torch.int32)
    for index, slots in enumerate(passes):
        both = 2 * counted(slots)
        buffer[index].scatter_add_(1, SLOT_EXPERTS, both)
    stat = {"rank": 0, "logical_count": buffer, "average_utilization_rate_over_window": None}
    save("stat/expert_distribution_recorder_1767225600.25.pt", stat)
    for rank in (0, 1):
        heads = [
            {"forward_pass_id": 100 + index, "rank": rank, "gatherer_key": "primary"}
            for index in range(len(passes))
        ]
        own = [
            {**head, "global_physical_count": counted(slots[:, rank::2])}
            for head, slots in zip(heads, passes, strict=True)
        ]
        every = [
            {
                **head,
                "input_ids": list(range(slots.shape[1])),
                "positions": list(range(slots.shape[1])),
                "extend_seq_lens": [6, 7] if slots.shape[1] == 13 else None,
                "forward_mode": 1 if slots.shape[1] == 13 else 2,
                "topk_ids_of_layer": slots,
                "misc_objects": [],
                "global_physical_count": counted(slots),
            }
            for head, slots in zip(heads, passes, strict=True)
        ]
        for mode, records in (("per_pass", own), ("per_token", every[:5])):
            save(
                f"{mode}/expert_distribution_recorder_1767225600.{rank + 1}_{rank}.pt",
                {"records": records, "last_physical_to_logical_map": SLOT_EXPERTS},
            )


if __name__ == "__main__":
    main()
