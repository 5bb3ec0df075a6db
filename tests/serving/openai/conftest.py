"""What tests of the OpenAI server ask."""

from tests.serving.questions import QUESTION as QUESTION
