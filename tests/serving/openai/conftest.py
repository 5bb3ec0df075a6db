"""Clients of the real server on the miniature."""

from __future__ import annotations

import openai
import pytest

from tests.serving.helpers import Server
from tests.serving.questions import QUESTION as QUESTION


@pytest.fixture(scope="session")
def client(front: Server) -> openai.OpenAI:
    """OpenAI's own client, which tries nothing twice."""
    return openai.OpenAI(base_url=f"{front.url}/v1", api_key="unused", max_retries=0)
