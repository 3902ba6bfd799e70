"""A library that answers as the NVIDIA driver's does, for tests on machines without a GPU.

Must import nothing but the standard library and `throttle.errors`. Never loaded by the daemon: a
test builds it (`library.py`), describes a machine (`machine.py`) and points processes at both.
"""
