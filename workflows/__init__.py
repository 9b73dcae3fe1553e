"""What the commands carry out, on all rooms below."""
