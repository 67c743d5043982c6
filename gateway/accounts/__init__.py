"""A team's users: who they are, the agent that each has, what they said, and what it cost."""
