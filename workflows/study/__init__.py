"""The course report's study: its settings, its steps, its page."""
