"""The simulated world: GPU, serving engine, workload, experiments and their report.

Every figure that comes out of this package is simulated and says so.
"""
