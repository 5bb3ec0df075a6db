"""Spoken dialogue over a WebSocket, with the events of OpenAI's Realtime API."""
