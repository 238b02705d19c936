"""`python -m workers.sandbox`: tries the sandbox on itself, and tells each layer as JSON."""

import json
import sys

from workers.sandbox.probe import attempt

user = int(sys.argv[2]) if len(sys.argv) > 2 else None
print(json.dumps(attempt(sys.argv[1] if len(sys.argv) > 1 else "auto", user)))  # noqa: T201
