"""Adapters: what each serving engine offers, turned into states for `throttle.client`.

Imports nothing but the client, and an engine only in the module that plugs into it. An adapter
never blocks its engine and never raises into it.
"""
