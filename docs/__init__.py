"""What writes the README's command reference and its picture: ``make docs``."""
