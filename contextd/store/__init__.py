"""Conversations in SQL, on SQLite and PostgreSQL: one way in (`writer`), one way out (`reader`)."""
