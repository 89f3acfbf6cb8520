"""Scripts that measure; each ends with one JSON line. Nothing imports them."""
