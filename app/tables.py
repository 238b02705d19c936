"""The tables. Every row belongs to a tenant; jobs keep what they need of models and datasets, so
that those can be deleted."""

from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from ulid import ULID

DEFAULT_TENANT = "default"


def now() -> datetime:
    return datetime.now(UTC)


def new_id(prefix: str) -> str:
    """An opaque id that sorts by the time it was made."""
    return f"{prefix}_{str(ULID()).lower()}"


class UtcTime(TypeDecorator[datetime]):
    """An aware UTC time on every database; SQLite keeps no zone of its own."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.astimezone(UTC) if value else None

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


class Base(DeclarativeBase):
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        datetime: UtcTime,
        dict[str, Any]: Json,
        list[Any]: Json,
        str: String,
        int: BigInteger,
    }


class Owned:
    """Columns of every row that a tenant owns."""

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(default=DEFAULT_TENANT, index=True)
    created_at: Mapped[datetime] = mapped_column(default=now)


class Upload(Owned):
    """Columns of what a user uploads."""

    name: Mapped[str]
    format: Mapped[str]
    sha256: Mapped[str]
    size_bytes: Mapped[int]
    status: Mapped[str] = mapped_column(default="inspecting")
    error: Mapped[dict[str, Any] | None] = mapped_column(default=None)
    facts: Mapped[dict[str, Any] | None] = mapped_column(default=None)


class ModelRow(Upload, Base):
    """A model that came, or one of the catalog. `origin` is what the latter is made from (see
    app.services.starting); until it is made, `size_bytes` is 0 and `sha256` the digest of that."""

    __tablename__ = "models"
    __table_args__ = (
        UniqueConstraint("tenant_id", "sha256"),
        Index("models_by_tenant", "tenant_id", "id"),
    )

    origin: Mapped[str | None] = mapped_column(default=None)


class DatasetRow(Upload, Base):
    __tablename__ = "datasets"
    __table_args__ = (
        UniqueConstraint("tenant_id", "sha256"),
        Index("datasets_by_tenant", "tenant_id", "id"),
    )


class PartialRow(Owned, Base):
    """An upload that comes in several requests. How much of it is there its file tells, not the
    row (app.services.partial)."""

    __tablename__ = "partial_uploads"
    __table_args__ = (Index("partial_uploads_by_digest", "tenant_id", "announced_sha256"),)

    # "model" or "dataset"
    kind: Mapped[str]
    name: Mapped[str | None] = mapped_column(default=None)
    length: Mapped[int]
    # The Upload-Metadata header as it came.
    upload_metadata: Mapped[str] = mapped_column(Text)
    # The digest that the client says the whole has.
    announced_sha256: Mapped[str | None] = mapped_column(default=None)
    # Of the whole, from just before it is stored on.
    sha256: Mapped[str | None] = mapped_column(default=None)
    format: Mapped[str | None] = mapped_column(default=None)
    # The model or dataset that it became.
    subject_id: Mapped[str | None] = mapped_column(default=None)
    expires_at: Mapped[datetime] = mapped_column(index=True)


class AnalysisRow(Owned, Base):
    """What a target makes of a file; made once for the same bytes and options."""

    __tablename__ = "analyses"
    __table_args__ = (UniqueConstraint("tenant_id", "key"),)

    # Digest of all that determines the result (app.domain.fingerprint).
    key: Mapped[str]
    sha256: Mapped[str]
    size_bytes: Mapped[int]
    options: Mapped[dict[str, Any]]
    status: Mapped[str] = mapped_column(default="analyzing")
    error: Mapped[dict[str, Any] | None] = mapped_column(default=None)
    result: Mapped[dict[str, Any] | None] = mapped_column(default=None)
    used_at: Mapped[datetime] = mapped_column(default=now)


class JobRow(Owned, Base):
    __tablename__ = "jobs"
    __table_args__ = (
        Index("jobs_by_tenant", "tenant_id", "id"),
        Index("jobs_by_status", "tenant_id", "status", "id"),
        Index("jobs_by_model", "tenant_id", "model_id", "id"),
        Index("jobs_ended", "status", "finished_at"),
    )

    status: Mapped[str] = mapped_column(default="queued")
    model_id: Mapped[str]
    spec: Mapped[dict[str, Any]]
    # Field of the spec -> {id, sha256, format} of the dataset it names.
    sources: Mapped[dict[str, Any]] = mapped_column(default=dict)
    # What was settled when it was prepared: digests, parts, shapes (workers.plan.Plan).
    plan: Mapped[dict[str, Any] | None] = mapped_column(default=None)
    # How the data was split, told for the report.
    splits: Mapped[str | None] = mapped_column(Text, default=None)
    verdict: Mapped[dict[str, Any] | None] = mapped_column(default=None)
    error: Mapped[dict[str, Any] | None] = mapped_column(default=None)
    priority: Mapped[int] = mapped_column(Integer, default=0)
    request_id: Mapped[str | None] = mapped_column(default=None)
    event_seq: Mapped[int] = mapped_column(default=0)
    started_at: Mapped[datetime | None] = mapped_column(default=None)
    finished_at: Mapped[datetime | None] = mapped_column(default=None)
    variants: Mapped[list["VariantRow"]] = relationship(
        order_by="VariantRow.position", cascade="all, delete-orphan", lazy="selectin"
    )


class VariantRow(Owned, Base):
    """A requested variant; the baseline is the one at position -1."""

    __tablename__ = "variants"
    __table_args__ = (Index("variants_by_status", "status"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    position: Mapped[int] = mapped_column(Integer)
    name: Mapped[str]
    recipe: Mapped[list[Any]]
    status: Mapped[str] = mapped_column(default="queued")
    stage: Mapped[str | None] = mapped_column(default=None)
    progress: Mapped[float] = mapped_column(Float, default=0.0)
    metrics: Mapped[dict[str, Any] | None] = mapped_column(default=None)
    notes: Mapped[list[Any]] = mapped_column(default=list)
    # One entry a trained stage, as the api shows it.
    training: Mapped[list[Any]] = mapped_column(default=list)
    error: Mapped[dict[str, Any] | None] = mapped_column(default=None)
    cached: Mapped[bool] = mapped_column(Boolean, default=False)
    seconds: Mapped[float | None] = mapped_column(Float, default=None)
    artifacts: Mapped[list["ArtifactRow"]] = relationship(
        order_by="ArtifactRow.id", cascade="all, delete-orphan", lazy="selectin"
    )


class ArtifactRow(Owned, Base):
    __tablename__ = "artifacts"
    __table_args__ = (UniqueConstraint("variant_id", "kind", "file_name"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    variant_id: Mapped[str] = mapped_column(ForeignKey("variants.id", ondelete="CASCADE"))
    kind: Mapped[str]
    file_name: Mapped[str]
    sha256: Mapped[str]
    size_bytes: Mapped[int]
    gzip_size_bytes: Mapped[int]


class EventRow(Base):
    """What happened to a job, numbered without gaps from 1 within it."""

    __tablename__ = "events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    tenant_id: Mapped[str] = mapped_column(default=DEFAULT_TENANT)
    name: Mapped[str]
    data: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=now)


class TaskRow(Owned, Base):
    """Work that is due or under way; deleted when it ends. See app.queue."""

    __tablename__ = "tasks"
    __table_args__ = (
        Index("tasks_due", "queue", "status", "tenant_id", "priority", "available_at", "id"),
        UniqueConstraint("kind", "subject_id"),
    )

    # Not indexed alone: PostgreSQL would take that index, and read all of a tenant's tasks.
    tenant_id: Mapped[str] = mapped_column(default=DEFAULT_TENANT)
    kind: Mapped[str]
    subject_id: Mapped[str]
    queue: Mapped[str]
    priority: Mapped[int] = mapped_column(Integer, default=0)
    status: Mapped[str] = mapped_column(default="queued")
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    # Attempts that ended without a word: the worker or its machine died under the task.
    lost: Mapped[int] = mapped_column(Integer, default=0)
    available_at: Mapped[datetime] = mapped_column(default=now)
    lease_until: Mapped[datetime | None] = mapped_column(default=None)
    worker: Mapped[str | None] = mapped_column(default=None)
    request_id: Mapped[str | None] = mapped_column(default=None)


class StepRow(Base):
    """A costly result kept by the digest of all that determines it; `making` until it is there."""

    __tablename__ = "steps"

    tenant_id: Mapped[str] = mapped_column(primary_key=True, default=DEFAULT_TENANT)
    key: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    status: Mapped[str] = mapped_column(default="making")
    # The task and attempt that make it: while their lease holds, nobody else needs to.
    task_id: Mapped[str | None] = mapped_column(default=None)
    attempt: Mapped[int | None] = mapped_column(Integer, default=None)
    files: Mapped[dict[str, Any]] = mapped_column(default=dict)
    data: Mapped[dict[str, Any]] = mapped_column(default=dict)
    created_at: Mapped[datetime] = mapped_column(default=now)


class IdempotencyRow(Base):
    """The first answer to a request that carried an Idempotency-Key."""

    __tablename__ = "idempotency_keys"

    tenant_id: Mapped[str] = mapped_column(primary_key=True, default=DEFAULT_TENANT)
    key: Mapped[str] = mapped_column(primary_key=True)
    fingerprint: Mapped[str]
    status: Mapped[int] = mapped_column(Integer)
    location: Mapped[str | None] = mapped_column(default=None)
    body: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(default=now)


class KeyRow(Owned, Base):
    """An API key. The secret is not kept: `digest` is the SHA-256 of the whole key, and `prefix`
    its first characters, by which it is found and told from others."""

    __tablename__ = "api_keys"

    name: Mapped[str]
    prefix: Mapped[str] = mapped_column(unique=True)
    digest: Mapped[str]
    scopes: Mapped[list[Any]]
    expires_at: Mapped[datetime | None] = mapped_column(default=None)
    revoked_at: Mapped[datetime | None] = mapped_column(default=None)
    # To the minute.
    last_used_at: Mapped[datetime | None] = mapped_column(default=None)


class AuditRow(Owned, Base):
    """Who changed what. Without a key: the command on the service's machine, or a service that
    asks for none."""

    __tablename__ = "audit"
    __table_args__ = (
        Index("audit_by_tenant", "tenant_id", "id"),
        Index("audit_by_time", "created_at"),
    )

    key_id: Mapped[str | None] = mapped_column(default=None)
    action: Mapped[str]
    subject: Mapped[str]
    request_id: Mapped[str | None] = mapped_column(default=None)


class WorkerRow(Base):
    """A worker process and when it was last heard of."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(primary_key=True)
    queues: Mapped[list[Any]]
    details: Mapped[dict[str, Any]] = mapped_column(default=dict)
    seen_at: Mapped[datetime] = mapped_column(default=now, index=True)


class TurnRow(Base):
    """When a tenant was last served in a queue; see app.turns."""

    __tablename__ = "turns"

    queue: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(primary_key=True)
    served_at: Mapped[datetime]


class QuotaRow(Base):
    """What a tenant may use, where that differs from the settings (null: as they say; -1: without
    limit), and the jobs that it submitted on a day (UTC)."""

    __tablename__ = "quotas"

    tenant_id: Mapped[str] = mapped_column(primary_key=True)
    max_storage_bytes: Mapped[int | None] = mapped_column(default=None)
    max_concurrent_jobs: Mapped[int | None] = mapped_column(default=None)
    max_jobs_per_day: Mapped[int | None] = mapped_column(default=None)
    max_queued_jobs: Mapped[int | None] = mapped_column(default=None)
    day: Mapped[str] = mapped_column(default="")
    jobs_of_day: Mapped[int] = mapped_column(default=0)


class WebhookRow(Owned, Base):
    """Where a tenant is told of events. Secrets are kept as they are: they sign."""

    __tablename__ = "webhooks"

    url: Mapped[str] = mapped_column(Text)
    description: Mapped[str] = mapped_column(default="")
    events: Mapped[list[Any]]
    secret: Mapped[str]
    # Signs beside `secret` until then, so that receivers can change over.
    old_secret: Mapped[str | None] = mapped_column(default=None)
    old_secret_until: Mapped[datetime | None] = mapped_column(default=None)
    enabled: Mapped[bool] = mapped_column(Boolean, default=True)
    disabled_reason: Mapped[str | None] = mapped_column(default=None)
    # Since when no delivery has succeeded.
    failing_since: Mapped[datetime | None] = mapped_column(default=None)


class DeliveryRow(Owned, Base):
    """A message to a webhook, written with the event that it tells of; its id is the message's."""

    __tablename__ = "deliveries"
    __table_args__ = (Index("deliveries_by_webhook", "webhook_id", "id"),)

    webhook_id: Mapped[str] = mapped_column(ForeignKey("webhooks.id", ondelete="CASCADE"))
    event: Mapped[str]
    # The body, byte for byte: every attempt sends the same.
    body: Mapped[str] = mapped_column(Text)
    status: Mapped[str] = mapped_column(default="pending")
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    # Attempts since it was made or replayed: the place in the schedule.
    tries: Mapped[int] = mapped_column(Integer, default=0)
    next_attempt_at: Mapped[datetime | None] = mapped_column(default=None)
    last_attempt_at: Mapped[datetime | None] = mapped_column(default=None)
    response_status: Mapped[int | None] = mapped_column(Integer, default=None)
    response_excerpt: Mapped[str | None] = mapped_column(Text, default=None)
    latency_ms: Mapped[float | None] = mapped_column(Float, default=None)
    error: Mapped[str | None] = mapped_column(Text, default=None)
    delivered_at: Mapped[datetime | None] = mapped_column(default=None)
