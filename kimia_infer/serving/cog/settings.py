"""The settings of the Cog predictors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import Field

from kimia_infer.serving.cog.fetch import Limits
from kimia_infer.serving.settings import Settings

DOWNLOAD_SECONDS = 120.0
"""Time for all URLs of a request, where the time limit of the service is not shorter."""


class CogSettings(Settings):
    """Settings of every service, and what a prediction may download."""

    urls: Literal["public", "any"] = Field(
        "public", description="Hosts from which URLs of callers are downloaded"
    )
    url_megabytes: int = Field(
        500,
        ge=1,
        description="Maximum size of the files of a request that are downloaded",
        json_schema_extra={"unit": "MB"},
    )

    def limits(self, begun: float, check: Callable[[], None]) -> Limits:
        """What the downloads of a request may take that began at ``begun`` (monotonic seconds).

        ``check`` raises when the request has ended.
        """
        seconds = min(self.timeout or DOWNLOAD_SECONDS, DOWNLOAD_SECONDS)
        size = self.url_megabytes * 1_000_000
        return Limits(begun, seconds, size, self.urls == "any", check)
