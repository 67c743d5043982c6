"""What the gateway keeps over a restart: one SQLite file, or a PostgreSQL that several gateways share."""
