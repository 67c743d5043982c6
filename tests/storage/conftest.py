from tests.storage.databases import address, database, postgres
from tests.storage.databases import empty_file as sqlite_file
from tests.storage.databases import empty_server as postgres_address

__all__ = ["address", "database", "postgres", "postgres_address", "sqlite_file"]
