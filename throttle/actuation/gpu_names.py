"""What the driver calls a GPU, in the words that bundles and plants are named by."""

from __future__ import annotations

import re
from typing import Final

#: Pattern in the driver's name, and the word; the first that fits counts. Where one chip comes on
#: boards of different power, the board is part of the word.
_WORDS: Final = (
    (r"A100[ -]SXM", "a100-sxm"),
    (r"A100", "a100-pcie"),
    (r"A800[ -]SXM", "a800-sxm"),
    (r"GH200", "gh200"),
    (r"H100 80GB HBM", "h100-sxm"),
    (r"H100 NVL", "h100-nvl"),
    (r"H100 PCIe", "h100-pcie"),
    (r"H200 NVL", "h200-nvl"),
    (r"GB200", "gb200"),
    (r"GB300", "gb300"),
    (r"H200", "h200-sxm"),
    (r"H20\b", "h20-sxm"),
    (r"B200", "b200"),
    (r"B300", "b300"),
)


def bundle_gpu_name(name: str) -> str:
    """The word for a GPU.

    Args:
        name: As NVML gives it, such as "NVIDIA H100 80GB HBM3".

    Returns:
        Such as `h100-sxm`; for a GPU without a word of its own its name in lower case, without the
        maker and with dashes: "NVIDIA GeForce RTX 5090" is `rtx-5090`.
    """
    for pattern, word in _WORDS:
        if re.search(pattern, name, re.IGNORECASE):
            return word
    bare = re.sub(r"\b(nvidia|geforce|tesla|quadro)\b", " ", name, flags=re.IGNORECASE)
    return "-".join(re.findall(r"[a-z0-9]+", bare.lower())) or "unknown"
