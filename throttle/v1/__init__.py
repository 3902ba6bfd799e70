"""Generated stubs of proto/throttle/v1, made by scripts/generate_protos.py. Nothing else here."""
