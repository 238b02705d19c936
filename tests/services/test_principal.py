"""Sessions are held to whoever acts: what they find, what they write, what they sign."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import JSON, Boolean, String, delete, func, insert, inspect, select, update

from app.db import Database
from app.principal import Acting, OutOfTenant, acting, confine, principal_of
from app.tables import (
    AuditRow,
    Base,
    DatasetRow,
    JobRow,
    KeyRow,
    ModelRow,
    UtcTime,
    VariantRow,
    new_id,
    now,
)

SHARED = {"workers"}


@contextmanager
def as_tenant(name: str) -> Iterator[None]:
    token = acting.set(Acting(principal_of(name, f"key_{name}", ["write"]), "test"))
    try:
        yield
    finally:
        acting.reset(token)


@pytest.fixture
def confined(database: Database) -> Database:
    confine(database)
    return database


def filled(column: Any, tenant: str) -> Any:
    """A value that a column takes, whatever it means."""
    if column.name == "tenant_id":
        return tenant
    if column.foreign_keys:
        return f"{next(iter(column.foreign_keys)).column.table.name}_{tenant}"
    if isinstance(column.type, String):
        return f"{column.table.name}_{tenant}"
    others: dict[Any, Any] = {JSON: {}, UtcTime: now(), Boolean: False}
    return next((value for kind, value in others.items() if isinstance(column.type, kind)), 1)


def furnish(database: Database, tenant: str) -> None:
    """A row of every table that belongs to tenants, in the order of their foreign keys."""
    with database.write() as session:
        for table in Base.metadata.sorted_tables:
            if table.name in SHARED:
                continue
            needed = [c for c in table.columns if not c.nullable]
            session.execute(insert(table).values({c.name: filled(c, tenant) for c in needed}))


def test_every_table_is_confined(confined: Database) -> None:
    for tenant in ("a", "b"):
        furnish(confined, tenant)
    of_b = {"a": "b"} | {f"{name}_a": f"{name}_b" for name in Base.metadata.tables}
    tables = {mapper.local_table.name: mapper.class_ for mapper in Base.registry.mappers}
    assert {name for name, row in tables.items() if not hasattr(row, "tenant_id")} == SHARED
    with as_tenant("a"), confined.read() as session:
        for name in tables.keys() - SHARED:
            row = tables[name]
            found = session.scalars(select(row)).all()
            assert [one.tenant_id for one in found] == ["a"], name
            assert session.scalar(select(func.count()).select_from(row)) == 1, name
            own = inspect(found[0]).identity
            foreign = tuple(of_b.get(part, part) for part in own)
            assert session.get(row, own) is not None, name
            assert session.get(row, foreign) is None, name
            wide = select(row).execution_options(all_tenants=True)
            assert len(session.scalars(wide).all()) == 2, name
    with confined.read() as session:
        assert session.get(JobRow, "jobs_b") is not None


def test_what_comes_along_with_a_row_is_confined(confined: Database) -> None:
    for tenant in ("a", "b"):
        furnish(confined, tenant)
    with confined.write() as session:
        # As no code of ours would leave it.
        session.execute(update(VariantRow).values(job_id="jobs_a"))
    with as_tenant("a"), confined.read() as session:
        job = session.get_one(JobRow, "jobs_a")
        assert [variant.id for variant in job.variants] == ["variants_a"]


def test_no_statement_changes_what_others_have(confined: Database) -> None:
    for tenant in ("a", "b"):
        furnish(confined, tenant)
    with as_tenant("a"), confined.write() as session:
        changed = update(ModelRow).values(name="x").returning(ModelRow.id)
        assert session.scalars(changed).all() == ["models_a"]
        assert session.execute(delete(DatasetRow)).rowcount == 1
    with confined.read() as session:
        names = dict(session.execute(select(ModelRow.tenant_id, ModelRow.name)).all())
        assert names == {"a": "x", "b": "models_b"}
        assert session.scalars(select(DatasetRow.tenant_id)).all() == ["b"]


@pytest.mark.parametrize("tenant", ["b", None])
def test_nothing_is_written_for_another_tenant(confined: Database, tenant: str | None) -> None:
    row = KeyRow(id=new_id("key"), tenant_id=tenant, name="n", prefix="p", digest="d", scopes=[])
    with pytest.raises(OutOfTenant), as_tenant("a"), confined.write() as session:
        session.add(row)
    with confined.read() as session:
        assert session.scalars(select(KeyRow)).all() == []


def test_a_change_and_its_signature_are_one(confined: Database) -> None:
    furnish(confined, "a")
    with confined.write() as session:
        session.execute(delete(AuditRow))

    def signed() -> list[tuple[str, str | None, str]]:
        with confined.read() as session:
            rows = session.scalars(select(AuditRow).order_by(AuditRow.id))
            return [(row.subject, row.key_id, row.action) for row in rows]

    def fail() -> None:
        with as_tenant("a"), confined.write() as session:
            session.get_one(ModelRow, "models_a").name = "new"
            session.flush()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert signed() == []
    with as_tenant("a"), confined.write() as session:
        session.get_one(ModelRow, "models_a").name = "new"
        session.flush()
        session.get_one(ModelRow, "models_a").name = "newer"
        # Its variants are the job's.
        session.get_one(VariantRow, "variants_a").name = "new"
        session.delete(session.get_one(DatasetRow, "datasets_a"))
    assert sorted(signed()) == [
        ("datasets_a", "key_a", "test"),
        ("models_a", "key_a", "test"),
    ]
    with confined.write() as session:
        session.get_one(ModelRow, "models_a").name = "by a worker"
    assert len(signed()) == 2
