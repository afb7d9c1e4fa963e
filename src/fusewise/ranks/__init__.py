"""The ranks of a group: who they are, how they start, what they agree on."""
