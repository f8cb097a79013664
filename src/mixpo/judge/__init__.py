"""LLM judges of two arms: questions, API client, reply parsing, stored verdicts and their statistics."""
