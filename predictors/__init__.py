"""The offline half and the prediction contract: descriptors, features, training, bundles.

Knows nothing of gRPC, NVML or the daemon; must never import `throttle`.
"""
