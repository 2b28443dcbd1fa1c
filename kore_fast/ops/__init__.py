"""The operations of KORE. Each module holds an operation's interface and its choice of backend.

``reference/`` beside them holds the plain PyTorch truth under the same file names.
"""

from kore_fast.ops.covariance import covariance_update_, finalize, new_count
from kore_fast.ops.nullspace import NullSpace, nullspace

__all__ = ["NullSpace", "covariance_update_", "finalize", "new_count", "nullspace"]
