"""The tasks by kind. Database and storage, no TensorFlow.

Every transaction that writes for a task first checks its lease: a run that lost it writes nothing.
"""

from collections.abc import Callable

from workers.analyzing import analyze
from workers.delivering import deliver
from workers.inspecting import inspect_dataset, inspect_model
from workers.lease import Lease
from workers.preparing import prepare
from workers.variants import variant
from workers.worker import Worker

HANDLERS: dict[str, Callable[[Worker, Lease], None]] = {
    "inspect_model": inspect_model,
    "inspect_dataset": inspect_dataset,
    "analyze": analyze,
    "prepare": prepare,
    "variant": variant,
    "deliver": deliver,
}


def handle(worker: Worker, lease: Lease) -> None:
    """Run the claimed task to its end."""
    HANDLERS[lease.claim.kind](worker, lease)
