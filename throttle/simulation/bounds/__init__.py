"""How little energy would have done: exact on tiny cases, a certificate, an achievable schedule."""
