"""The command line: finds the command, runs it, and turns errors into one line each."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import TYPE_CHECKING, Final

from throttle import __version__
from throttle.errors import ThrottleError

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Command -> what it is for. Its module is `throttle.commands.<command>`, with `_` for `-`, and is
#: imported only when it is asked for: `throttle status` waits for no XGBoost.
COMMANDS: Final = {
    "serve": "run the daemon",
    "check-config": "check a configuration and print what it comes to",
    "status": "ask a daemon what it is doing",
    "health": "ask a daemon whether it serves",
    "doctor": "look at this machine's GPUs: what to fix before a daemon sets clocks",
    "release": "return GPUs to default clocks now",
    "token": "make a token for one caller",
    "reset": "return GPUs to default clocks without a daemon",
    "bridge": "report an engine from outside it: ForwardPassMetrics, statistics or /metrics",
    "demo": "play a real trace on a simulated GPU, at maximum clock and throttled",
    "simulate": "play simulated engines in real time beside a daemon",
    "profile": "drive clocks over an exploration plan and record iterations",
    "profile-engine": "record real engines while clocks follow an exploration plan",
    "load": "send a bounded load to an engine that serves OpenAI completions",
    "plant": "what one iteration costs on the simulated GPU",
    "bench": "time a decision, the transport and the daemon",
    "compare": "compare clock policies on a simulated GPU",
    "replay": "run the controller again over a recorded stream",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Without the program's name; None takes those of the process.

    Returns:
        Exit status: 0 if it worked, 1 after an error, 2 for wrong usage.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="throttle",
        description="Predictive GPU clock throttling for mixture-of-experts serving.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"throttle {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    try:
        for name, purpose in COMMANDS.items():
            if given[:1] == [name]:
                module = importlib.import_module(f"throttle.commands.{name.replace('-', '_')}")
                module.add_parser(commands)
            else:
                commands.add_parser(name, help=purpose)
        parsed = parser.parse_args(given)
        status: int = parsed.run(parsed)
    except ModuleNotFoundError as error:
        return _fail(
            f"{error.name} is not installed; install moe-throttle[daemon] ([train] for "
            "recordings, profiles and the demo, [bridge] for bridges)"
        )
    except Exception as error:
        if not _is_ours(error):
            raise
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted")
    return status


def _is_ours(error: Exception) -> bool:
    """Whether it was raised on purpose, with a message for people."""
    if isinstance(error, ThrottleError):
        return True
    predictors = sys.modules.get("predictors.errors")  # imported only where it can be raised
    return predictors is not None and isinstance(error, predictors.PredictorsError)


def _fail(text: str) -> int:
    for line in text.splitlines():
        print(f"throttle: {line}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
