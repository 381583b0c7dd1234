"""Modules: the non-local block, masked layers, and the layers child networks are made of."""
