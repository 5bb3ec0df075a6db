"""The server that OpenAI's clients and a browser talk to."""
