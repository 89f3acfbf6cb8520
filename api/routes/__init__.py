"""Request handlers, one file per resource. They know HTTP and the service, not the socket."""
