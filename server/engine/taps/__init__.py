"""What calibrators want to see of a prompt: one module per kind of observation."""
