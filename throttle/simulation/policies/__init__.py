"""Clock policies that run beside a simulated engine, in process: ours, and what it must beat."""
