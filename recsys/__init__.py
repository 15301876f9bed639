"""The domain: events, items, histories, metrics, configuration and messages; it knows no framework."""

__version__ = "0.1.0"
