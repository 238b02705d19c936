"""lists and counts that stay as fast with many rows

Revision: 0009, after 0008
"""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

# By tenant alone, a page would be found by sorting all of its rows.
LISTED = ("jobs", "models", "datasets")


def upgrade() -> None:
    for table in LISTED:
        op.create_index(f"{table}_by_tenant", table, ["tenant_id", "id"])
    op.create_index("variants_by_status", "variants", ["status"])


def downgrade() -> None:
    op.drop_index("variants_by_status", "variants")
    for table in reversed(LISTED):
        op.drop_index(f"{table}_by_tenant", table)
