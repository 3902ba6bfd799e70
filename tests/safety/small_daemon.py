"""The real supervisor and actuator under a controller that does nothing but hold a clock.

Run by path, by tests: it starts in a fraction of the time that the whole daemon takes. Says on
standard output how far it has come, sets the clock when it is sent a line, and stops in order on
SIGTERM.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import time
from pathlib import Path

from throttle.actuation.orders import Orders
from throttle.actuation.process import open_backend
from throttle.actuation.remote import ActuatorEndedError, RemoteActuator
from throttle.actuation.supervisor import ACTUATOR_COMMAND, Supervisor


def say(text):
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def renew(actuator):
    with contextlib.suppress(ActuatorEndedError):
        while True:
            actuator.renew()
            time.sleep(0.1)


def control(channel, orders, clock_mhz):
    """Be the controller: hold a clock on every GPU, and renew."""
    backend = open_backend(orders)
    try:
        actuator = RemoteActuator(channel, backend, orders.gpus, orders.settings)
        lease = actuator.acquire("engine", orders.gpus)
        threading.Thread(target=renew, args=(actuator,), daemon=True).start()
        say("claimed")
        sys.stdin.readline()
        say(f"set {lease.set_clock(clock_mhz, 'test').clock_mhz}")
        signal.sigwait({signal.SIGTERM})
        actuator.close()
    except ActuatorEndedError:
        return 1
    return 0


def main():
    orders = Orders.from_json(sys.argv[1])
    step = json.loads(sys.argv[2])
    crashing = (sys.executable, str(Path(__file__).with_name("crashing_actuator.py")), step)
    supervisor = Supervisor(orders, "", 5.0, crashing if step else ACTUATOR_COMMAND)
    channel = supervisor.start()
    return supervisor.watch() if channel is None else control(channel, orders, 600)


if __name__ == "__main__":
    sys.exit(main())
