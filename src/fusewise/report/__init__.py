"""One set of records per profile, shown as text, JSON, CSV, Markdown, a picture or a page."""
