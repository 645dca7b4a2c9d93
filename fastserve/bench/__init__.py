"""`fastserve bench SUBJECT`: measures FastServe itself: scheduler, offline, serve."""
