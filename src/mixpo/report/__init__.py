"""Tables and pages, read from finished folders."""
