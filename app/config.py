"""Every setting of the service; read nowhere else. Documented in docs/operations.md."""

import os
import tempfile
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

GIB = 2**30


class Settings(BaseSettings):
    """Settings from arguments, else from environment variables named LITESMITH_<FIELD>."""

    model_config = SettingsConfigDict(env_prefix="LITESMITH_", extra="ignore")

    host: str = "127.0.0.1"
    port: int = 8000
    data_dir: Path = Path("litesmith-data")
    database_url: str | None = None
    broker_url: str | None = None
    storage_url: str | None = None
    s3_endpoint: str | None = None
    s3_region: str = "us-east-1"
    s3_access_key_id: str | None = None
    s3_secret_access_key: str | None = None

    max_upload_bytes: int = Field(default=4 * GIB, ge=1)
    max_unpacked_bytes: int = Field(default=20 * GIB, ge=1)
    cors_origins: Annotated[list[str], NoDecode] = []
    log_level: str = "INFO"
    log_format: str = Field(default="json", pattern="^(json|text)$")

    fast_slots: int = Field(default=max(1, (os.cpu_count() or 1) // 2), ge=1)
    train_slots: int = Field(default=1, ge=1)
    light_spares: int = Field(default=4, ge=0)
    tensorflow_spares: int = Field(default=1, ge=0)

    variant_deadline_s: float = Field(default=1800, gt=0)
    train_deadline_s: float = Field(default=6 * 3600, gt=0)
    variant_memory_bytes: int = Field(default=8 * GIB, ge=GIB // 2)
    evaluation_time_limit_s: float = Field(default=10, gt=0)
    evaluation_threads: int = Field(default=min(4, os.cpu_count() or 1), ge=1)
    edgetpu_compiler: str = Field(default="edgetpu_compiler", min_length=1)
    lease_s: float = Field(default=30, gt=1)
    heartbeat_s: float = Field(default=1, gt=0)
    reconcile_s: float = Field(default=2, gt=0)
    max_attempts: int = Field(default=3, ge=1)
    # After the first signal to end: how long what runs may go on.
    drain_s: float = Field(default=0, ge=0)
    event_retention_days: float = Field(default=30, gt=0)
    # What a job has found must be there until it ends: longer than its longest step.
    cache_retention_days: float = Field(default=30, ge=1)

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _separated_by_commas(cls, value: object) -> object:
        return value.split(",") if isinstance(value, str) else value

    @field_validator("cors_origins")
    @classmethod
    def _without_blanks(cls, value: list[str]) -> list[str]:
        return [origin.strip().rstrip("/") for origin in value if origin.strip()]

    @cached_property
    def root(self) -> Path:
        """The data directory, absolute."""
        return self.data_dir.expanduser().resolve()

    @cached_property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{self.root / 'litesmith.db'}"

    @cached_property
    def storage(self) -> str:
        return self.storage_url or f"file://{self.root / 'objects'}"

    @cached_property
    def broker_socket(self) -> Path:
        """The embedded broker's socket. Not in the data directory: a socket's path has at most
        107 bytes, a data directory's may have more."""
        digest = sha256(str(self.root).encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"litesmith-{os.getuid()}-{digest}" / "broker.sock"

    @cached_property
    def broker(self) -> str:
        return self.broker_url or f"redis+socket://{self.broker_socket}"

    @cached_property
    def work_dir(self) -> Path:
        return self.root / "work"

    @cached_property
    def latency_lock(self) -> Path:
        """Shared by every worker of the machine, so that measurements do not disturb each other."""
        return Path(tempfile.gettempdir()) / f"litesmith-{os.getuid()}-latency.lock"

    def environment(self) -> dict[str, str]:
        """These settings as environment variables, for the processes that are started with them."""
        values = self.model_dump(mode="json", exclude_none=True)
        values["data_dir"] = str(self.root)
        return {f"LITESMITH_{name.upper()}": _as_text(value) for name, value in values.items()}


def _as_text(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)
