"""Architectures as graphs, and what their files must hold."""
