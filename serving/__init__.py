"""The online host: event log, live histories, and the Ray Serve application."""
