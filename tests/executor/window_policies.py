"""What windows and text switches the roll-out is tried under."""

from __future__ import annotations

POLICIES = [
    {"window": "full"},
    {"window": "full", "text_switch": "recache"},
    {"window": "longlive"},
    {"window": "longlive", "text_switch": "recache"},
    {"window": "tempact-self-forcing"},
    {"window": "longlive-infinite", "text_switch": "recache"},
    {"window": "infinity-rope"},
]
