"""What is measured, and how: scripts, in no wheel."""
