"""Returns GPUs to default clocks without a daemon: after a crash, and for operators."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final

from throttle.actuation.hand import Hand
from throttle.actuation.journal import GpuRecord, left_slow_uuids
from throttle.errors import ConflictError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from throttle.actuation.backend import ClockDriver
    from throttle.actuation.hand import ClockChange
    from throttle.actuation.settings import ActuationSettings

#: Beyond the deadline of one driver call.
_MARGIN_SECONDS: Final = 1.0


def restore(
    backend: ClockDriver,
    directory: Path,
    uuids: Iterable[str],
    settings: ActuationSettings,
    *,
    tell: Callable[[ClockChange], None],
    holder: str,
) -> dict[str, str]:
    """Reset GPUs that nobody holds, each on a thread of its own.

    Args:
        backend: The driver.
        directory: Where the records lie.
        uuids: The GPUs; those that records name are reset as well.
        settings: Times.
        tell: Told of every write.
        holder: What others are told meanwhile.

    Returns:
        By GPU, why it may still be slow; empty when it is at default clocks.
    """
    seen = set(backend.uuids())
    results: dict[str, str] = {}
    hands: list[Hand] = []
    records: list[GpuRecord] = []
    for uuid in dict.fromkeys((*uuids, *left_slow_uuids(directory))):
        if uuid not in seen:
            results[uuid] = f"GPU {uuid} is not on this machine"
            continue
        try:
            record = GpuRecord(directory, uuid, holder)
        except ConflictError as error:
            results[uuid] = str(error)
        else:
            records.append(record)
            hands.append(
                Hand(uuid, backend, record, settings=settings, clock=time.monotonic, tell=tell)
            )
    threads = [threading.Thread(target=hand.work, daemon=True) for hand in hands]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + settings.call_deadline_seconds + _MARGIN_SECONDS
    for hand, record, thread in zip(hands, records, threads, strict=True):
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            results[hand.uuid] = f"GPU {hand.uuid}: the driver call hangs"
        else:
            results[hand.uuid] = hand.failure or hand.denial
            record.close()
    return results
