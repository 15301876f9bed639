"""Column names of the canonical tables, in one place.

    EVENTS   user_id, item_id, timestamp, optional action, value, session_id, event_id
    ITEMS    item_id, text, and any categorical or numeric columns
    USERS    user_id, and any columns
    IMPRESSIONS   request_id, user_id, item_id, timestamp, label (1 where the item was taken, else 0)

A log's own names are mapped to these by configuration.
"""

USER_ID = "user_id"
ITEM_ID = "item_id"
TIMESTAMP = "timestamp"  # int64 microseconds UTC; a plain position where only the order is known
ACTION = "action"
VALUE = "value"
SESSION_ID = "session_id"
EVENT_ID = "event_id"
TEXT = "text"
REQUEST_ID = "request_id"
LABEL = "label"
ITEM_KEY = "item_key"  # append-only uint32, given at first sight, kept for ever
USER_KEY = "user_key"
