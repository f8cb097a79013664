"""The recipes that come with mixpo."""
