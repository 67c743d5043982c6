"""The schema's history. Revisions go forward only: a downgrade would drop what was kept, so none is written."""
