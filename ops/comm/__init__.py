"""Providers of the comm stage: how rows travel between the ranks that share the experts. One provider a file.

setup: what a graph says of its ranks; exchange: what a provider of several ranks implements, and its cached state;
tokens: rows that tensor-parallel ranks hold alike; payload: quantised rows. ops/__init__.py imports (registers) the providers.
"""
