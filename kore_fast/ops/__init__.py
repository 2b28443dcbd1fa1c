"""The operations of KORE. Each module holds an operation's interface; `backends` holds the choice between backends.

Beside them, under the same file names: ``reference/``, the plain PyTorch truth; ``native/``, what csrc/ compiles;
``triton/``, the portable GPU kernels.
"""

from kore_fast.ops.covariance import covariance_update_, finalize, new_count
from kore_fast.ops.frozen_lora import frozen_lora, frozen_lora_many
from kore_fast.ops.nullspace import NullSpace, nullspace

__all__ = [
    "NullSpace",
    "covariance_update_",
    "finalize",
    "frozen_lora",
    "frozen_lora_many",
    "new_count",
    "nullspace",
]
