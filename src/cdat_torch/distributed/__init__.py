"""Several processes that share one step: replicas, sharded and tensor-parallel parameters."""
