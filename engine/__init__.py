"""The engine: from token ids to text, on one device. Knows neither HTTP nor configuration files.

Importing it is cheap: torch is loaded by `engine.model` and `engine.kernels` alone.
"""
