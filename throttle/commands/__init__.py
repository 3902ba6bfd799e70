"""One module per command of `throttle`: `add_parser` describes it, `run` does it.

Whatever is slow to import is imported by `run`.
"""
