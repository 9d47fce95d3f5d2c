"""Proof that a quantized model still works: fixed windows of held-out text, divergence from the original, gates."""
