"""Recipes and arms: experiments as expressions over stages, and running them."""
