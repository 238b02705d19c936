"""Every setting of the service; read nowhere else. Documented in docs/operations.md."""

import os
import tempfile
from functools import cached_property
from hashlib import sha256
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

GIB = 2**30


RateLimit = Annotated[str, Field(pattern=r"^[1-9]\d{0,8}/(second|minute|hour|day)$")]


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

    auth: Literal["auto", "on"] = "auto"
    audit_retention_days: float = Field(default=365, gt=0)

    max_upload_bytes: int = Field(default=4 * GIB, ge=1)
    max_unpacked_bytes: int = Field(default=20 * GIB, ge=1)
    cors_origins: Annotated[list[str], NoDecode] = []
    log_level: str = "INFO"
    log_format: str = Field(default="json", pattern="^(json|text)$")

    # "auto": where keys are asked for.
    rate_limits: Literal["auto", "on", "off"] = "auto"
    rate_limit_reads: RateLimit = "3000/minute"
    rate_limit_writes: RateLimit = "120/minute"
    rate_limit_uploads: RateLimit = "60/minute"
    rate_limit_strangers: RateLimit = "30/minute"
    # Per tenant, where the database says nothing else of it (`litesmith tenants set`).
    tenant_max_storage_bytes: int | None = Field(default=None, ge=0)
    tenant_max_concurrent_jobs: int | None = Field(default=None, ge=0)
    tenant_max_jobs_per_day: int | None = Field(default=None, ge=0)
    tenant_max_queued_jobs: int | None = Field(default=None, ge=0)
    max_queued_jobs: int = Field(default=10_000, ge=1)

    # Receivers of webhooks that are not on the public internet: 10.1.0.0/16,127.0.0.0/8
    webhook_allowed_networks: Annotated[list[str], NoDecode] = []
    webhook_timeout_s: float = Field(default=10, gt=0, le=60)
    # Pauses between the attempts: about a day in all.
    webhook_retry_s: Annotated[list[float], NoDecode] = [
        *(5, 60, 300, 1800, 7200, 18_000, 28_800, 28_800)
    ]
    webhook_slots: int = Field(default=4, ge=0)

    fast_slots: int = Field(default=max(1, (os.cpu_count() or 1) // 2), ge=1)
    train_slots: int = Field(default=1, ge=1)
    light_spares: int = Field(default=4, ge=0)
    tensorflow_spares: int = Field(default=1, ge=0)

    variant_deadline_s: float = Field(default=1800, gt=0)
    train_deadline_s: float = Field(default=6 * 3600, gt=0)
    variant_memory_bytes: int = Field(default=8 * GIB, ge=GIB // 2)
    variant_disk_bytes: int = Field(default=64 * GIB, ge=GIB)
    sandbox: Literal["auto", "require", "off"] = "auto"
    sandbox_user: int | None = Field(default=None, ge=1)
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
    # Off where they are not set.
    job_retention_days: float | None = Field(default=None, gt=0)
    artifact_retention_days: float | None = Field(default=None, gt=0)
    upload_retention_days: float | None = Field(default=None, gt=0)
    # Of a resumable upload after its last byte came.
    partial_retention_days: float = Field(default=2, gt=0)

    @field_validator("cors_origins", "webhook_allowed_networks", "webhook_retry_s", mode="before")
    @classmethod
    def _separated_by_commas(cls, value: object) -> object:
        return value.split(",") if isinstance(value, str) else value

    @field_validator("cors_origins")
    @classmethod
    def _without_blanks(cls, value: list[str]) -> list[str]:
        return [origin.strip().rstrip("/") for origin in value if origin.strip()]

    @cached_property
    def asks_for_keys(self) -> bool:
        """Whether every request needs an API key: always, but on a loopback address."""
        return self.auth == "on" or not is_loopback(self.host)

    @field_validator("webhook_allowed_networks")
    @classmethod
    def _are_networks(cls, value: list[str]) -> list[str]:
        return [str(ip_network(text.strip())) for text in value if text.strip()]

    @field_validator("webhook_retry_s")
    @classmethod
    def _are_pauses(cls, value: list[float]) -> list[float]:
        if not value or min(value) <= 0:
            raise ValueError("name at least one pause, each over 0 seconds")
        return value

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


def is_loopback(host: str | None) -> bool:
    """Whether a name or address can only be this machine's own."""
    if host == "localhost":
        return True
    try:
        return host is not None and ip_address(host).is_loopback
    except ValueError:
        return False


def _as_text(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)
