"""The wrapped optimizer: its groups, its state, and the direction that it proposes."""
