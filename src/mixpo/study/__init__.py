"""A blind study with people: what they are asked, where their judgements are kept, and what these say."""
