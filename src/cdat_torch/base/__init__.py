"""The wrapped optimizer: its groups, its state, and the step that it proposes."""
