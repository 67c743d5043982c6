"""The schema's history. Revisions go forward only: a downgrade would drop what was kept, so none is written.

A release brings one revision at most, and one that the gateway of before can work with: columns and tables are added,
and what nothing uses any more is dropped a release later (`tests/storage/test_schema.py` holds it).
"""
