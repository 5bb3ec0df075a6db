"""Speed and memory of the model, measured on this machine."""

from scripts.benchmark.stand_in import provide_pydantic

provide_pydantic()
