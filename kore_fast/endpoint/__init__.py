"""Models behind an OpenAI-compatible server: how they are asked, how fast, and what they answered and cost."""
