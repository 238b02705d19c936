"""several artifacts of a kind for one variant: source and header of a C array, segments

Revision: 0005, after 0004
"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# SQLite gives constraints no name of their own: this is the one that PostgreSQL gave.
NAMES = {"uq": "%(table_name)s_%(column_0_N_name)s_key"}
BEFORE = ["variant_id", "kind"]
AFTER = ["variant_id", "kind", "file_name"]


def upgrade() -> None:
    _replace(BEFORE, AFTER)


def downgrade() -> None:
    op.execute(
        "DELETE FROM artifacts WHERE EXISTS (SELECT 1 FROM artifacts AS other WHERE"
        " other.variant_id = artifacts.variant_id AND other.kind = artifacts.kind"
        " AND other.file_name < artifacts.file_name)"
    )
    _replace(AFTER, BEFORE)


def _replace(old: list[str], new: list[str]) -> None:
    with op.batch_alter_table("artifacts", schema=None, naming_convention=NAMES) as batch_op:
        batch_op.drop_constraint(f"artifacts_{'_'.join(old)}_key", type_="unique")
        batch_op.create_unique_constraint(f"artifacts_{'_'.join(new)}_key", new)
