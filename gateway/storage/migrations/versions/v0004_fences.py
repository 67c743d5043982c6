"""Which lease of a thread its pin was written under: a replica that lost it does not write over what came after."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the number; a gateway of before, which does not know it, leaves it as it is."""
    op.add_column("pins", sa.Column("fence", sa.BigInteger, nullable=False, server_default="0"))
