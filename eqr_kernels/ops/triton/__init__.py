"""Ops as Triton kernels, and what they share with the Triton backend. Importing a module of it imports Triton."""
