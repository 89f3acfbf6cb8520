"""The API's description of itself: an OpenAPI document, and a page to read it."""
