"""What one person ran once, and how to run it again."""
