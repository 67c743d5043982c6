"""What alembic runs: the revisions, on the connection that it is given, in that connection's transaction."""

from alembic import context

from gateway.storage.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
