"""Where a tensor lives and how it moves: device mesh, sharded checkpoints."""
