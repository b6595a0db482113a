"""Kernels for GPUs in Triton: `programs/` runs on the device, the modules here check, choose sizes and launch.

Triton is imported with them, so nobody imports them but who is about to use them; `availability.py` says who may.
"""
