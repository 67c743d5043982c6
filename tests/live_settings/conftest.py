from tests.storage.databases import address, database, postgres, postgres_address, sqlite_file

__all__ = ["address", "database", "postgres", "postgres_address", "sqlite_file"]
