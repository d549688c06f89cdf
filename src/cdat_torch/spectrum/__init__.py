"""Eigenvalues, spectral density and trace of the Hessian."""
