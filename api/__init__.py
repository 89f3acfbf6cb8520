"""The OpenAI-compatible HTTP server. Knows engines only through `engine.client`; needs no torch."""
