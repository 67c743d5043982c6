from tests.storage.databases import postgres, postgres_address

__all__ = ["postgres", "postgres_address"]
