"""The brain, pure: state -> projection -> slack -> selection, driven by the controller.

No I/O, no wall clock, no randomness: time is the engine's. Must not import grpc, pynvml, the
daemon, the actuation or the simulation.
"""
