"""From each schema of the database to the next one. Alembic reads them; see `store.opening`."""
