"""turns in the queues, quotas, webhooks and their deliveries

Revision: 0007, after 0006
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
TIME = sa.DateTime(timezone=True)

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_index("tasks_due", "tasks")
    due = ["queue", "status", "tenant_id", "priority", "available_at", "id"]
    op.create_index("tasks_due", "tasks", due)
    op.drop_index("ix_tasks_tenant_id", "tasks")
    op.create_index("jobs_ended", "jobs", ["status", "finished_at"])
    op.create_table(
        "turns",
        sa.Column("queue", sa.String(), primary_key=True),
        sa.Column("tenant_id", sa.String(), primary_key=True),
        sa.Column("served_at", TIME, nullable=False),
    )
    op.create_table(
        "quotas",
        sa.Column("tenant_id", sa.String(), primary_key=True),
        sa.Column("max_storage_bytes", sa.BigInteger()),
        sa.Column("max_concurrent_jobs", sa.BigInteger()),
        sa.Column("max_jobs_per_day", sa.BigInteger()),
        sa.Column("max_queued_jobs", sa.BigInteger()),
        sa.Column("day", sa.String(), nullable=False),
        sa.Column("jobs_of_day", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "webhooks",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("tenant_id", sa.String(), nullable=False, index=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("description", sa.String(), nullable=False),
        sa.Column("events", JSON, nullable=False),
        sa.Column("secret", sa.String(), nullable=False),
        sa.Column("old_secret", sa.String()),
        sa.Column("old_secret_until", TIME),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("disabled_reason", sa.String()),
        sa.Column("failing_since", TIME),
    )
    op.create_table(
        "deliveries",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("tenant_id", sa.String(), nullable=False, index=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column(
            "webhook_id",
            sa.String(),
            sa.ForeignKey("webhooks.id", ondelete="CASCADE"),
            nullable=False,
        ),
        sa.Column("event", sa.String(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("next_attempt_at", TIME),
        sa.Column("last_attempt_at", TIME),
        sa.Column("response_status", sa.Integer()),
        sa.Column("response_excerpt", sa.Text()),
        sa.Column("latency_ms", sa.Float()),
        sa.Column("error", sa.Text()),
        sa.Column("delivered_at", TIME),
    )
    op.create_index("deliveries_by_webhook", "deliveries", ["webhook_id", "id"])


def downgrade() -> None:
    op.drop_table("deliveries")
    op.drop_table("webhooks")
    op.drop_table("quotas")
    op.drop_table("turns")
    op.drop_index("jobs_ended", "jobs")
    op.create_index("ix_tasks_tenant_id", "tasks", ["tenant_id"])
    op.drop_index("tasks_due", "tasks")
    op.create_index("tasks_due", "tasks", ["queue", "status", "priority", "id"])
