"""The device mesh."""

from mla_jax.config.schema import require, schema


@schema
class MeshConfig:
    """Sizes of the device mesh; -1 (at most once) takes the devices that are left."""

    data: int = 1
    """Replicas of the weights (across nodes: HSDP)."""
    fsdp: int = -1
    """Devices over which weights, gradients and optimizer state are sharded, and rows of the batch too."""
    context: int = 1
    """Devices over which the tokens of each training sequence are sharded."""

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.context)
        require(all(s == -1 or s >= 1 for s in sizes), f"mesh sizes must be -1 or at least 1, got {sizes}")
        require(sizes.count(-1) <= 1, f"at most one mesh size may be -1, got {sizes}")
