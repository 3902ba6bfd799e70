"""The hands: who may set which GPU's clock, and how it is set and given back.

Must not import grpc, numpy, the predictors, the control or the daemon: this part is meant to run
in a small privileged process of its own.
"""
