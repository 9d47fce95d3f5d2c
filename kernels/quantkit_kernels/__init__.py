"""Kernels of quantkit, each beside its plain-torch reference. Imports torch (and triton) only, nothing of quantkit."""
