"""`fastserve bench SUBJECT`: measures FastServe itself, one subject a file."""
