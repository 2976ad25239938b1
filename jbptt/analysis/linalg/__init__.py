"""Matrices: singular values over many orders of magnitude, dominant eigenvectors, powers."""
