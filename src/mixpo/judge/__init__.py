"""Language models as judges of two arms: what they are asked, what they reply, what it says."""
