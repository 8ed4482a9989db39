"""What Alembic runs: upgrades on the connection that it is handed, in that connection's transaction."""

from alembic import context

from covey_coordinator.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,
)
context.run_migrations()
