"""Several processes that take one step: replicas, sharded and tensor parallel parameters."""
