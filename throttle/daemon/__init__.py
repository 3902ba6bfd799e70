"""The process beside the engines: gRPC, sessions, configuration, metrics, recordings.

Stands on `control` and `actuation`; must not import the simulation, and nothing of the client.
"""
