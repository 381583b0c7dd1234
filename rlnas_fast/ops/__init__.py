"""Kernels behind functions: schema, checks, fake, autograd, backends."""
