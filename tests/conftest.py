"""Shapes and types of every signature are checked while the tests run."""

from jaxtyping import install_import_hook

install_import_hook("mixpo.algorithms", "beartype.beartype")
