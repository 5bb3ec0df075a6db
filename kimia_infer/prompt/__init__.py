"""From encoded messages to the two parallel token tracks that the language model reads."""
