"""A digest over a version's row, by which an edit by hand shows at the next read.

It is no signature: whoever writes to the database on purpose can write the seal too. The metadata
is left out, since the capsule's own digest covers it and a fetch compares the two.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC
from typing import Any


def seal_of(fields: Mapping[Any, Any]) -> str:
    """SHA-256 over what a row of `versions` says, the scene by its name. 64 hex digits."""
    moments = [
        moment and moment.astimezone(UTC).isoformat()
        for moment in (fields["created"], fields["retired"])
    ]
    sealed = [
        fields["scene"],
        fields["number"],
        fields["digest"],
        fields["base"],
        fields["base_fingerprint"],
        fields["rank"],
        fields["parent"],
        *moments,
        fields["created_by"],
    ]
    return hashlib.sha256(json.dumps(sealed).encode()).hexdigest()
